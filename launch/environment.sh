# Sourced by the launchers, tests/run.sh and .ci/run: makes .venv on first use and puts it on PATH.
#   setup_environment REQUIREMENTS_FILE
# PYTHON names the interpreter (default python3); JAX_EXTRA (cpu, cuda13, cuda12, tpu) overrides what is found here.

hardware_extra() {
  if [[ -n "${JAX_EXTRA:-}" ]]; then
    echo "$JAX_EXTRA"
  elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then
    echo tpu
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    # The driver says the newest CUDA that it can run.
    local major
    major=$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p' | head -n 1)
    if [[ "${major:-0}" -ge 13 ]]; then echo cuda13; else echo cuda12; fi
  else
    echo cpu
  fi
}

setup_environment() {
  local root=$1 requirements=$2 python=${PYTHON:-python3} extra stamp
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    echo "error: $python is not Python 3.11, 3.12 or 3.13; name one that is, as PYTHON=/usr/bin/python3.12" >&2
    return 1
  fi
  extra=$(hardware_extra)
  # What is installed is what these files and the hardware ask for; when they change, pip brings .venv up to date.
  stamp="$extra $(cat "$root"/requirements*.txt "$root/pyproject.toml" | cksum)"
  local marker="$root/.venv/.installed-$(basename "$requirements" .txt)"
  if [[ "$(cat "$marker" 2>/dev/null)" != "$stamp" ]]; then
    echo "installing into $root/.venv for $extra (once, a few minutes)" >&2
    [[ -x "$root/.venv/bin/python" ]] || "$python" -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -r "$root/$requirements" "jax[$extra]" || return 1
    echo "$stamp" >"$marker"
  fi
  use_environment "$root"
}

# Puts an environment that is there on PATH, as on the nodes of a cluster, which share its directory.
use_environment() {
  local root=$1
  export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
  # glibc's allocator asks for huge pages: on a CPU a small model's step is otherwise half page faults. There it also keeps
  # up to 1 GiB of freed memory: otherwise the buffers of each step are returned, and cleared by the kernel in the next.
  local allocator=glibc.malloc.hugetlb=1
  if [[ "$(hardware_extra)" == cpu ]]; then
    allocator+=:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824
    allocator+=:glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1
  fi
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$allocator}"
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}
