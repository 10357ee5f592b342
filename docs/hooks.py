"""Add to the site what the repository shows otherwise: docstrings, notebooks, scripts, MathJax, its address."""

# pyright: reportMissingImports=false
import re
import subprocess
from importlib.metadata import files
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^\* `(sltt[\w.]*)`.*$", re.MULTILINE)  # of the page api.md
OPTIONS = {  # of an entry, beside those of mkdocs.yml
    "sltt.Rule": "{members: [__call__, run, step], filters: []}",
    "sltt.rules.Truncated": "{members: []}",
    "sltt.rules.batch.Batch": '{filters: ["!^_"], merge_init_into_class: false}',
    "sltt.Padded": "{members: []}",
    "sltt.Stream": "{members: [__call__, reset, state_dict, load_state_dict], filters: []}",
}
FUNCTIONS = {  # whose module has their name
    name: f"{name}.{name.rpartition('.')[2]}" for name in ("sltt.analysis.agreement", "sltt.analysis.advice")
}
MATHJAX = "mathjax/static/mathjax/es5/tex-svg.js"  # one file, with its fonts; nothing is fetched from elsewhere


def on_config(config):
    """Link the repository, if this clone knows where it is from."""
    remote = ["git", "-C", str(Path(config.config_file_path).parent), "remote", "get-url", "origin"]
    address = subprocess.run(remote, capture_output=True, text=True).stdout.strip()
    if address.startswith("https://"):
        config.repo_url = address.removesuffix(".git")
        config.repo_name = config.repo_url.removeprefix("https://").partition("/")[2]
    return config


def on_files(files_, config):
    """Add MathJax under its licence, the scripts of examples/, and a page for each notebook."""
    package = {str(path): path.locate() for path in files("django-static-mathjax") or []}
    for name, source in (("tex-svg.js", MATHJAX), ("LICENSE", "mathjax/static/mathjax/LICENSE")):
        files_.append(File.generated(config, f"mathjax/{name}", abs_src_path=str(package[source])))
    for script in (ROOT / "examples").glob("*.py"):
        files_.append(File.generated(config, f"examples/{script.name}", abs_src_path=str(script)))
    for notebook in [file for file in files_ if file.src_uri.endswith(".ipynb")]:
        _add_page(files_, config, notebook)
    return files_


def on_page_markdown(markdown, page, config, files):
    """Lead links to notebooks to their pages, those to scripts to the copies, and show docstrings in place of names."""
    if page.file.src_uri == "api.md":
        markdown = ENTRY.sub(_entry, markdown)
    return re.sub(r"(?<=\w)\.ipynb\)", ".md)", markdown).replace("](../examples/", "](examples/")


def _entry(found: re.Match[str]) -> str:
    """Return the directive that shows the docstring of a name."""
    name = found[1]
    if name in FUNCTIONS:
        return f"\n::: {FUNCTIONS[name]}\n    options: {{heading: {name}, toc_label: {name.rpartition('.')[2]}}}\n"
    return f"\n::: {name}\n" + (f"    options: {OPTIONS[name]}\n" if name in OPTIONS else "")


def _add_page(pages: Files, config, notebook: File) -> None:
    """Add a notebook as Markdown, with the outputs that are stored in it."""
    path = PurePosixPath(notebook.src_uri)
    text, resources = MarkdownExporter().from_filename(
        notebook.abs_src_path, {"unique_key": path.stem, "output_files_dir": f"{path.stem}-outputs"}
    )
    text = re.sub(r"\n{4,}", "\n\n", text.replace("![png]", "![Figure]"))  # the gap of a progress bar
    link = f'[Download this notebook](./{path.name}){{: download="{path.name}" }}\n'
    pages.append(File.generated(config, str(path.with_suffix(".md")), content=f"{text}\n{link}"))
    for name, content in resources["outputs"].items():
        pages.append(File.generated(config, str(path.parent / name), content=content))
