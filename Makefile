# Each target makes its environment when it is missing; PYTHON chooses the interpreter, 3.11 or newer.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt
# Two workers with a thread each: threads of both would wait for each other at every barrier.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile
FLOOR_PIP = .venv/bin/python -m pip --python .venv-floor/bin/python install --quiet --no-deps
BENCH = OMP_NUM_THREADS=1 .venv/bin/pytest -q benchmarks/regression
SOURCES := setup.py pyproject.toml constraints.txt
# seen from inside a virtual environment: where the packages of .venv are
PACKAGES = $(shell .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: help demo test test-all test-cuda test-floor lint bench-check bench-store docs-tables clean

help:
	@echo "make demo        train a small model on real text, sample from it, plot its next token"
	@echo "make test        the tests, about 19 minutes on 2 cores"
	@echo "make test-all    the long ones too: fuzzing, mutations, every GPU architecture"
	@echo "make test-cuda   all of csrc/: compiled for every GPU, and run on a CPU under sanitizers"
	@echo "make test-floor  import and compile every kernel with the oldest Triton we support"
	@echo "make lint        ruff, and mypy on the built wheel"
	@echo "make bench-check  fail where an op has become a fifth slower beside torch; seconds"
	@echo "make bench-store  store the ratios of this machine that bench-check compares with"
	@echo "make docs-tables  write the tables of the documentation from benchmarks/results"
	@echo "make clean       remove the environments and what builds leave behind"

demo: .venv/.core
	.venv/bin/fastlm demo

test: .venv/.test
	$(PYTEST) -m "not slow"

test-all: .venv/.test
	$(PYTEST)

test-cuda: .venv/.test
	$(PYTEST) -k cuda tests/test_cuda_*.py tests/test_cross_entropy.py tests/test_linear_cross_entropy*.py tests/test_loss_*.py \
		tests/test_attention.py tests/test_attention_options.py tests/test_attention_autograd.py tests/test_attention_with_kv_cache*.py \
		tests/test_rms_norm.py tests/test_rotary.py tests/test_glu.py

# mypy cannot follow package_dir, so it reads the installed wheel, from outside the root.
lint: .venv-lint/.tools
	.venv-lint/bin/ruff check
	.venv-lint/bin/ruff format --check
	rm -rf build .venv-lint/dist
	.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation -w .venv-lint/dist .
	.venv-lint/bin/python $(PIP) --no-deps --force-reinstall .venv-lint/dist/*.whl
	cd .venv-lint && bin/mypy --config-file ../pyproject.toml -p fastlm | tee mypy.txt
	@count=$$(find fastlm kernels benchmarks -name '*.py' | wc -l); \
	grep -q "in $$count source files" .venv-lint/mypy.txt || \
	{ echo "mypy did not check all $$count files of fastlm, kernels and benchmarks" >&2; exit 1; }

test-floor: .venv-floor/.installed
	.venv-floor/bin/python -P -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
	.venv-floor/bin/python -P -c 'import fastlm.functional, fastlm.nn, fastlm.cli, fastlm.training, fastlm.inference'
	.venv-floor/bin/python -P -m pytest -m "not slow" tests/test_ahead_of_time.py
	.venv-floor/bin/python -P -m pytest tests/test_attention_gluon.py -k compile

bench-check: .venv/.bench
	$(BENCH)

bench-store: .venv/.bench
	$(BENCH) --store

docs-tables: .venv/.core
	.venv/bin/python benchmarks/tables.py

clean:
	rm -rf .venv .venv-lint .venv-floor build dist fastlm.egg-info

.venv/.core: $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) setuptools
	.venv/bin/python $(PIP) -e ".[plot]"
	touch $@

.venv/.test: .venv/.core
	.venv/bin/python $(PIP) -e ".[test]"
	touch $@

.venv/.bench: .venv/.test
	.venv/bin/python $(PIP) -e ".[bench]"
	touch $@

# The other environments see the packages of .venv below their own, so torch is installed once.
.venv-lint/.tools: .venv/.core
	$(PYTHON) -m venv --clear .venv-lint
	.venv-lint/bin/python $(PIP) ruff mypy types-PyYAML
	echo $(PACKAGES) > "$$(echo .venv-lint/lib/python*/site-packages)/packages.pth"
	touch $@

.venv-floor/.installed: .venv/.test
	$(PYTHON) -m venv --clear --without-pip .venv-floor
	$(FLOOR_PIP) triton==3.6.0
	$(FLOOR_PIP) torch==2.11.0+cpu 2>/dev/null || \
	echo "pip finds no CPU build of torch 2.11: the floor is tested with the torch of .venv"
	echo $(PACKAGES) > "$$(echo .venv-floor/lib/python*/site-packages)/packages.pth"
	$(FLOOR_PIP) --no-build-isolation --force-reinstall -e .
	touch $@
