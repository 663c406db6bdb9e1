# Either command alone works on a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
DEMO = runs/demo
# A quarter of the presets' updates: the whole of it in minutes on two cores.
DEMO_FLAGS = --folder $(DEMO) --evaluate-images 2000

.PHONY: demo test lint assets clean

demo: .venv/run
	.venv/bin/python train.py $(DEMO_FLAGS) --stage 1 --iterations 1000 --evaluate-every 500
	.venv/bin/python train.py $(DEMO_FLAGS) --stage 2 --iterations 400 --evaluate-every 200
	.venv/bin/python train.py $(DEMO_FLAGS) --stage 3 --iterations 250 --evaluate-every 125

test: .venv/dev
	.venv/bin/python -m pytest -q tests

lint: .venv/dev
	.venv/bin/ruff check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
