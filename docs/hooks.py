"""What the site takes from where it is built: MathJax from a Python package, the repository's address from git."""

# pyright: reportMissingImports=false
import subprocess
from importlib.metadata import files
from pathlib import Path

from mkdocs.structure.files import File

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
    """Put MathJax beside the pages, under its licence."""
    package = {str(path): path.locate() for path in files("django-static-mathjax") or []}
    for name, source in (("tex-svg.js", MATHJAX), ("LICENSE", "mathjax/static/mathjax/LICENSE")):
        files_.append(File.generated(config, f"mathjax/{name}", abs_src_path=str(package[source])))
    return files_
