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
    assert main(epochs=3) > 0.3  # chance is 0.1; after three, 0.47 to 0.9 by the example and the rounding
    assert not list(tmp_path.iterdir())
