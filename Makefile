# make demo   compare rules on the digits, and write a report
# make test   run the test suite
# make slow   run the tests of whole programs, examples, notebooks and the wheel, and of compiled kernels
# make soak   long checks: kills, constant memory, damaged checkpoints
# make check  lint, format, types and layers
# make docs   build the documentation site
# make notebooks   run the notebooks of docs/notebooks and store their outputs
# make paper  measure the paper's claims at small scale: make paper DATA=DIR; run again to continue
# make gpu    test and measure on a GPU, and fill docs/gpu.md: make gpu DATA=DIR; run again to continue
# make figures   tables and figures of docs, from the logs in docs/results; fails where a log is of older code
# make gallery   run the demo and the examples for docs/examples.md, and list the names of docs/api.md
# make release   all checks, the site and the packages; prints what is left to do by hand
# make package   build and check the source archive and the wheels, four with kernels; needs g++-aarch64-linux-gnu
PYTHON ?= python3
BIN := .venv/bin
# bytecode is written at the first import: pip would write that of what nobody imports, which is most of it,
# and without any, each process that a test starts compiles the source of PyTorch anew
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable

.PHONY: demo test slow soak check docs notebooks package paper gpu figures gallery release clean

demo: .venv/installed
	$(BIN)/sltt compare digits --rules BPTT,SLTT,SLTT:k=1 --epochs 10 --seeds 3 --save runs/demo
	$(BIN)/sltt profile digits --rules BPTT,SLTT,SLTT:k=1 --steps 1,4,16 --weights runs/demo/SLTT-seed0 --save runs/demo
	$(BIN)/sltt agreement digits --taus 1.1,2,10 --save runs/demo
	$(BIN)/sltt report runs/demo

test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

slow: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m slow

soak: .venv/installed-dev
	$(BIN)/pytest -p no:xdist --timeout 0 tests/soak.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: .venv/installed-docs
	$(BIN)/pip install --quiet --disable-pip-version-check matplotlib snntorch
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		docs/notebooks/*.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams docs/notebooks/*.ipynb

package: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/pip install --quiet --disable-pip-version-check ziglang
	for wheel in manylinux_2_17_x86_64 manylinux_2_17_aarch64 macosx_11_0_arm64 win_amd64; do \
		SLTT_KERNELS=$$wheel $(BIN)/python -m build --wheel --no-isolation || exit 1; done
	$(BIN)/twine check --strict dist/*

release: check test slow docs package
	@echo "by hand: write the date into CHANGELOG.md and commit; git tag v$$($(BIN)/python -c 'import sltt; print(sltt.__version__)');"
	@echo "git push --tags; $(BIN)/twine upload dist/*"

paper: .venv/installed-dev
	$(BIN)/python benchmarks/paper.py $(if $(DATA),--data $(DATA))

gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py $(if $(DATA),--data $(DATA)) $(if $(DEVICE),--device $(DEVICE))

figures: .venv/installed-dev
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python docs/draw_memory.py
	$(BIN)/python docs/draw_rules.py
	$(BIN)/python benchmarks/recall_figure.py --steps 16 --rules SLTT
	$(BIN)/python docs/draw_map.py
	$(BIN)/python benchmarks/curves_figure.py
	$(BIN)/python benchmarks/logs.py

gallery: .venv/installed-dev demo
	$(BIN)/python docs/draw_examples.py
	$(BIN)/python docs/write_api.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sltt needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(INSTALL) '.[report]'
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(INSTALL) '.[dev,interop,examples]'
	@touch .venv/installed $@  # it has all that a report needs

.venv/installed-docs: .venv/installed
	$(INSTALL) '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
