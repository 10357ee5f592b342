"""What the site takes from elsewhere: pages from notebooks, MathJax from a Python package, the repository from git."""

# pyright: reportMissingImports=false
import re
import subprocess
from importlib.metadata import files
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

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
    """Put MathJax beside the pages, under its licence, and make pages of notebooks."""
    package = {str(path): path.locate() for path in files("django-static-mathjax") or []}
    for name, source in (("tex-svg.js", MATHJAX), ("LICENSE", "mathjax/static/mathjax/LICENSE")):
        files_.append(File.generated(config, f"mathjax/{name}", abs_src_path=str(package[source])))
    for notebook in [file for file in files_ if file.src_uri.endswith(".ipynb")]:
        _add_page(files_, config, notebook)
    return files_


def on_page_markdown(markdown, page, config, files):
    """Let links to notebooks lead to their pages; in the repository they lead to the notebooks."""
    return re.sub(r"(?<=\w)\.ipynb\)", ".md)", markdown)


def _add_page(pages: Files, config, notebook: File) -> None:
    """The notebook as Markdown, with the outputs that are stored in it."""
    path = PurePosixPath(notebook.src_uri)
    text, resources = MarkdownExporter().from_filename(
        notebook.abs_src_path, {"unique_key": path.stem, "output_files_dir": f"{path.stem}-outputs"}
    )
    text = re.sub(r"\n{4,}", "\n\n", text.replace("![png]", "![Figure]"))  # the gap of a progress bar
    link = f'[Download this notebook](./{path.name}){{: download="{path.name}" }}\n'
    pages.append(File.generated(config, str(path.with_suffix(".md")), content=f"{text}\n{link}"))
    for name, content in resources["outputs"].items():
        pages.append(File.generated(config, str(path.parent / name), content=content))
