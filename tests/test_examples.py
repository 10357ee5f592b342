import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "plain_pytorch": "torch",
    "lightning_trainer": "lightning",
    "accelerate_loop": "accelerate",
    "snntorch_network": "snntorch",
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the frameworks about themselves
@pytest.mark.parametrize(("name", "library"), NEEDS.items())
def test_an_example_learns(name, library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(library, reason=f"the example is for {library}")
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    assert main(epochs=2) > 0.5  # chance is 0.1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NEEDS)
def test_the_page_takes_what_an_example_prints(name):
    pytest.importorskip("matplotlib", reason="the pictures are drawn with it")
    script = runpy.run_path(str(EXAMPLES.parent / "docs" / "draw_examples.py"))
    page = script["PAGE"].read_text()
    start, shown = f"{name}.py", re.compile(r"```text\n(.*?)```", re.DOTALL)
    written = script["with_output"](page, name, "test accuracy 12.3%\n")
    before, after = (one.partition(start)[2] for one in (page, written))
    assert shown.search(after)[1] == "test accuracy 12.3%\n"
    assert after.replace("test accuracy 12.3%\n", shown.search(before)[1], 1) == before
