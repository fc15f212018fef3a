#!/usr/bin/env bash
# Gathers, on a machine with internet, the wheels that an offline CUDA machine lacks for the comparison; about 30 MB.
# That machine has torch, lightning, transformers, accelerate, matplotlib, psutil and pytest, a C++ compiler and nvcc.
#
#   bash experiments/gpu_proof/wheels.sh FOLDER            here; `make install` has run, or PYTHON names one with torch
#   python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl && export PYTHONPATH=SITE       there
#
# FOR=3.12 is the Python there. Versions are those that the settings in peers/ were read from.
set -euo pipefail
out=${1:?usage: wheels.sh FOLDER}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

get() { # wheels for x86-64 Linux, whatever runs here; pip matches each glibc tag exactly
  local tags=()
  for glibc in 39 35 34 31 28 27 24 17; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${FOR:-3.12}" --implementation cp \
    "${tags[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$out" "$@"
}

get torchao==0.18.0 trainstream==0.4.1 diffusers==0.42.1 importlib_metadata zipp nvidia-ml-py
get pydantic==2.14.3 pydantic_core==2.50.4 annotated-types typing-inspection hjson py-cpuinfo msgpack einops # DeepSpeed's
# DeepSpeed comes as source: this makes a pure wheel, whose operators are compiled there at their first use.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$out" deepspeed==0.19.8
ls -l "$out"
