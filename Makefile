# Every target works from a clean clone: it makes .venv and installs when needed, and is quick when nothing changed.
#   make demo       the main job on real data, in about a minute        make test      the tests
#   make ui         MLflow and Prefect on this machine                  make test-all  the slow ones too
#   make lint       format, types, import directions                    make bench     speed and memory, as ratios
#   make bench-merge  merging beside fusion_bench and mergekit, quality of every merger (half an hour)
#   make bench-compress  codecs beside zstd, zipnn and others: bytes, speed, quality (ten minutes)
#   make bench-finetune  training beside the plain Trainer; which tuner merges best, of images and texts (an hour)
#   make bench-store  the store beside boto3, obstore and cp: a folder and a real S3 server (ten minutes)
#   make clean      remove what the targets made; models stay (rm -r .deltaworks forgets them too)

PYTHON ?= python3
PIP    := .venv/bin/pip --disable-pip-version-check
# one thread per process: faster for small models, and bit-identical between runs
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint format bench bench-merge bench-compress bench-finetune bench-store ui clean

demo: .venv/.user
	.venv/bin/deltaworks run demo

ui: .venv/.user
	.venv/bin/deltaworks ui

test: .venv/.dev
	.venv/bin/pytest

test-all: .venv/.dev
	.venv/bin/pytest -m ""

lint: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: .venv/.dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/.dev
	.venv/bin/python -m tests.benchmarks

# PARTS="opcm growth" runs some of them; FUSION_BENCH and MERGEKIT name the peers
bench-merge: .venv/.dev
	.venv/bin/python -m tests.benchmarks.merging $(PARTS)

# PARTS="ternary lossless quality" likewise; SMALL=1 in a minute; zipnn takes part where it is installed
bench-compress: .venv/.dev
	.venv/bin/python -m tests.benchmarks.compressing $(PARTS)

bench-finetune: .venv/.dev
	.venv/bin/python -m tests.benchmarks.training
	DELTAWORKS_HOME=.deltaworks/bench .venv/bin/deltaworks report mergeability --to tests/benchmarks/results
	.venv/bin/python -m tests.benchmarks.texts
	DELTAWORKS_HOME=.deltaworks/bench .venv/bin/deltaworks report mergeability mergeability-text --to tests/benchmarks/results

# PARTS="s3 directory" likewise; SMALL=1 in seconds; obstore takes part where it is installed
bench-store: .venv/.dev
	.venv/bin/python -m tests.benchmarks.storing $(PARTS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Deltaworks needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.user: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/.user
