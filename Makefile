# Either command alone works on a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
DEMO = runs/demo
# Fewer updates than the presets, so that the whole of it takes minutes on two cores.
DEMO_TRAIN = .venv/bin/python train.py --folder $(DEMO) --evaluate-images 2000
EMBEDDED = runs/embedded
EXPORT = .venv/bin/python -m experiments.make_assets export

.PHONY: demo demo-text test soak lint assets bench clean

demo: .venv/curves
	$(DEMO_TRAIN) --stage 1 --iterations 2000 --evaluate-every 500
	$(DEMO_TRAIN) --stage 2 --iterations 2000 --evaluate-every 500
	$(DEMO_TRAIN) --stage 3 --iterations 1000 --evaluate-every 500
	.venv/bin/python evaluate.py --checkpoint $(DEMO)/stage3/best.pt --steps 1 2 3 --heun 18 9 5 \
		--n 5000 --out $(DEMO)/evaluation.json
	.venv/bin/python sample.py --checkpoint $(DEMO)/stage3/best.pt --compare --n 10 --force \
		--out $(DEMO)/compare.png

# Emoji from captions: a third of the presets' updates.
DEMO_TEXT = runs/demo-text
DEMO_TEXT_TRAIN = .venv/bin/python train.py --dataset emoji --folder $(DEMO_TEXT) --evaluate-images 500
demo-text: .venv/text .venv/curves
	$(DEMO_TEXT_TRAIN) --stage 1 --iterations 400 --evaluate-every 400
	$(DEMO_TEXT_TRAIN) --stage 2 --iterations 150 --evaluate-every 150
	$(DEMO_TEXT_TRAIN) --stage 3 --iterations 150 --evaluate-every 150
	.venv/bin/python sample.py --checkpoint $(DEMO_TEXT)/stage3/best.pt --compare --force \
		--out $(DEMO_TEXT)/compare.png

test: .venv/dev
	.venv/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests

# The long version of the fault tests, recorded: minutes.
soak: .venv/dev
	OMP_NUM_THREADS=1 .venv/bin/python tests/soak.py
	.venv/bin/python -m experiments.readme

lint: .venv/dev
	.venv/bin/ruff check .

# The embedded networks and the README's scores of them, as they were recorded: one thread, seed 0.
assets: .venv/run
	OMP_NUM_THREADS=1 .venv/bin/python train.py --ema-rampup 0 --folder $(EMBEDDED) --stage 0
	$(EXPORT) $(EMBEDDED)/stage0/best.pt assets/digits-teacher.pt
	OMP_NUM_THREADS=1 .venv/bin/python train.py --ema-rampup 0 --folder $(EMBEDDED)
	for k in 0 1 2 3; do mkdir -p results/embedded/stage$$k && cp $(EMBEDDED)/stage$$k/config.json \
		$(EMBEDDED)/stage$$k/metrics.jsonl results/embedded/stage$$k; done
	$(EXPORT) $(EMBEDDED)/stage3/best.pt assets/digits-student.pt
	.venv/bin/python evaluate.py --dataset digits --runs none --steps 1 2 3 --heun 18 --repeats 3 \
		--out results/embedded/evaluation.json
	.venv/bin/python evaluate.py --dataset digits --heun 9 5 --out results/embedded/evaluation.json
	.venv/bin/python sample.py --runs none --compare --force --out results/compare.png
	.venv/bin/python -m experiments.readme

# The records behind docs/SPEED.md; on a machine with nothing else to do.
BENCH = .venv/bin/python -m experiments.bench
DIGITS = $(BENCH) --iterations 10 --repeats 7
CIFAR10 = $(BENCH) --dataset cifar10 --batch 8 --warm-up 1
bench: .venv/run
	OMP_NUM_THREADS=1 $(DIGITS) --json results/bench-digits-sid-1-thread.json
	OMP_NUM_THREADS=1 $(DIGITS) --loss dm --what train memory \
		--json results/bench-digits-dm-1-thread.json
	$(DIGITS) --json results/bench-digits-sid.json
	$(DIGITS) --loss dm --what train memory --json results/bench-digits-dm.json
	.venv/bin/python -m experiments.measure_scaling
	$(CIFAR10) --repeats 5 --stage 1 --json results/bench-cifar10-sid-1.json
	$(CIFAR10) --repeats 3 --stage 2 --what train memory --json results/bench-cifar10-sid-2.json
	$(CIFAR10) --repeats 3 --stage 3 --what train memory --json results/bench-cifar10-sid-3.json
	$(CIFAR10) --repeats 3 --loss dm --what train memory --json results/bench-cifar10-dm.json
	.venv/bin/python -m experiments.readme

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/text: requirements-text.txt .venv/run
	.venv/bin/python -m pip install --quiet -r requirements-text.txt
	touch $@

# What draws the curves of a run; nothing needs it.
.venv/curves: .venv/run
	.venv/bin/python -m pip install --quiet "matplotlib>=3.8"
	touch $@

.venv/dev: requirements-dev.txt requirements-text.txt .venv/run
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
