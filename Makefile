# make demo   everything set up, then real packets through the three dialects
# make test   everything set up, the oracles too, then all tests
# Both work on a fresh Debian machine, as root: network namespaces and netfilter are the subject.

VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
ORACLES := iptables nftables conntrack libnftables1 libgvc6 iproute2 strace util-linux

.PHONY: demo test conform model mutations faults hostile fuzz soak bench lint types layers wheel check clean oracles userlands systemd pictures vagrant vagrant-box vagrant-share

demo: $(VENV)/.installed
	$(VENV)/bin/netapply demo

test: $(VENV)/.installed oracles userlands
	$(PY) -m coverage run -m pytest $(PYTEST)
	@$(PY) -m coverage report --skip-covered --skip-empty --sort=cover > coverage.txt

# One environment for all: the project, editable, and what tests and linters need.
$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get update -qq && apt-get install -y -qq python3 python3-venv; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[reader,agent,dev]'
	touch $@

# Readers that are not ours, for the tests alone: the product starts no program.
oracles:
	@for tool in iptables nft conntrack ip strace nsenter libgvc.so.6; do \
	  command -v $$tool >/dev/null || ldconfig -p | grep -q $$tool || { apt-get update -qq && apt-get install -y -qq $(ORACLES); break; }; done

# The six traffic types of docs/traffic-types.md.
pictures: $(VENV)/.installed
	for number in 1 2 3 4 5 6; do \
	  $(VENV)/bin/netapply graph docs/pictures/capture.yaml --backend nftables --flow $$number >docs/pictures/type-$$number.svg || exit 1; done

# Readers of three releases, and Prometheus, unpacked under build/ from the machine's own mirror: seconds, once. MIRROR=URI for another.
userlands: $(VENV)/.installed
	@$(PY) -m tests.userlands $(if $(MIRROR),--mirror $(MIRROR))

# What an apply costs beside the kernel's share and the tools': minutes. QUICK=1 below one; BENCH='-o FILE --strict'.
bench: $(VENV)/.installed oracles
	@$(PY) -m compileall -q netapply backends  # as pip does when it installs
	$(PY) -m bench $(if $(QUICK),--quick) $(BENCH)

# The conformance suite at level full, on each of our backends: minutes. LEVEL=stress adds a thousand random plans.
conform: $(VENV)/.installed
	for backend in nftables iptables-nft iptables-legacy; do \
	  $(VENV)/bin/netapply conform --backend $$backend --level $(or $(LEVEL),full) $(if $(SEED),--seed $(SEED)) || exit 1; done

# A thousand random plans and their flows, on each of our backends: minutes. SEED=N for others.
model: $(VENV)/.installed
	for backend in nftables iptables-nft iptables-legacy; do \
	  $(VENV)/bin/netapply conform --backend $$backend --level stress -k 'model ' --seed $(or $(SEED),0) || exit 1; done

# Every mistake in the place of each of our backends: minutes. A mistake that no case notices asks for one.
mutations: $(VENV)/.installed
	for backend in nftables iptables-nft iptables-legacy; do \
	  $(VENV)/bin/netapply conform --backend $$backend --mutations || exit 1; done

# Commands killed and failed at each of their system calls: a quarter of an hour; the table of docs/reliability.md.
# FAULTS='--only migrate' for some of them.
faults: $(VENV)/.installed oracles
	$(PY) -m tests.faults $(if $(FAULTS),$(FAULTS),--write docs/reliability.md)

# 10,000 applies while others write the same tables as fast as they can: a quarter of an hour.
hostile: $(VENV)/.installed oracles
	$(PY) -m tests.faults.hostile --write docs/reliability.md

# 10,000 namespaces from their beginning to their end, in one process, ten minutes: nothing may grow.
soak: $(VENV)/.installed oracles
	$(PY) -m tests.faults.soak --write docs/reliability.md

# Bytes that nobody well-meaning sends, to all that takes bytes: ten minutes, and an input that broke something is kept
# in tests/data/fuzz. SECONDS=N for another time, SEED=N for other inputs, FUZZ='--target plan' for one of them.
fuzz: $(VENV)/.installed
	$(PY) -m tests.fuzz --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0) $(FUZZ)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright

layers: $(VENV)/.installed
	$(VENV)/bin/lint-imports

# What users install: built, put into an environment of its own, and tested from there.
wheel: $(VENV)/.installed oracles
	rm -rf dist build/wheel && mkdir -p build/wheel
	$(PY) -m build --wheel --outdir dist . >/dev/null
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet dist/*.whl pytest pytest-asyncio hypothesis
	cp -r tests pyproject.toml build/wheel/
	cd build/wheel && venv/bin/netapply demo >demo.txt || { cat demo.txt; exit 1; }
	cd build/wheel && venv/bin/python -m pytest -q -p no:cacheprovider tests/test_promises.py

# The service on a real systemd in a container, killed, hung and upgraded under traffic: three minutes, and one for the
# root file system, once (300 MB, ROOT=DIR for another place).
ROOT ?= build/systemd/root
systemd: $(VENV)/.installed
	tests/systemd/root.sh $(ROOT) $(PY)
	NETAPPLY_TEST_ROOT=$(abspath $(ROOT)) $(PY) -m pytest tests/systemd

# The four kernels, a machine for each, one at a time: docs/kernels.md. Not part of check: an hour at level core.
# KERNELS='5.10 6.1' for some of them, LEVEL=full for all cases, STEPS='demo unit' for some steps.
vagrant: build/vagrant/netapply.box vagrant-share
	vagrant/libvirt.sh python3 vagrant/matrix.py --level $(or $(LEVEL),core) $(if $(STEPS),--only $(STEPS) --) $(KERNELS); \
	  code=$$?; python3 vagrant/kernels.py > build/vagrant/kernels.md && cp build/vagrant/kernels.md docs/; exit $$code

# What a machine gets to see: the wheel and all that it needs, so that nothing is reached from inside.
vagrant-share: $(VENV)/.installed
	rm -rf build/vagrant/share && mkdir -p build/vagrant/share
	$(PY) -m build --wheel --outdir build/vagrant/share/wheelhouse . >/dev/null
	$(PY) -m pip download --quiet --dest build/vagrant/share/wheelhouse --only-binary :all: --python-version 3.11 \
	  --platform manylinux2014_x86_64 "$$(echo build/vagrant/share/wheelhouse/netapply-*.whl)[agent]"
	cp vagrant/check.py build/vagrant/share/

# The box and its kernels, from the machine's own mirror: three minutes, once. The target vagrant-box builds them anew.
build/vagrant/netapply.box:
	$(if $(MIRROR),MIRROR=$(MIRROR)) vagrant/box.sh build/vagrant

vagrant-box:
	rm -f build/vagrant/netapply.box
	$(MAKE) build/vagrant/netapply.box

check: lint types layers wheel test

clean:
	rm -rf $(VENV) dist build coverage.txt .coverage
