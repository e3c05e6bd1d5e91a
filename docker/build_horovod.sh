#!/usr/bin/env bash
# Builds the Horovod pinned in requirements/horovod.txt against the TensorFlow of an environment, and installs it there.
#
#   docker/build_horovod.sh .venv/bin/python
#
# Gloo is always in; MPI where mpicxx is found; NCCL where the caller sets HOROVOD_GPU_OPERATIONS=NCCL: that needs the
# packages of requirements/cuda.txt, and nvcc on PATH or in HOROVOD_CUDA_HOME/bin.
set -euo pipefail

python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

tensorflow=$("$python" -c 'import tensorflow; print(tensorflow.sysconfig.get_include())')

# Horovod 0.28.1 includes headers of two libraries that TensorFlow 2.21 ships elsewhere, below external/.
external=$tensorflow/external
export CPATH=$external/highwayhash:$external/farmhash_archive/src${CPATH:+:$CPATH}
# Its copy of Gloo uses the types of <cstdint> without including it, which gcc 13 no longer forgives, and asks for a
# CMake so old that CMake 4 refuses.
export CXXFLAGS="-include cstdint ${CXXFLAGS:-}"
export CMAKE_POLICY_VERSION_MINIMUM=3.5
# Called from make, this would hold make's own flags, and Horovod would then compile one file at a time.
MAKEFLAGS=-j$(nproc)
export MAKEFLAGS

export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
if command -v mpicxx >/dev/null; then
  export HOROVOD_WITH_MPI=1
else
  export HOROVOD_WITHOUT_MPI=1
fi

# NCCL is the one that TensorFlow loads: its headers and its library lie in its package, where the linker finds no
# libnccl.so, and at run time Horovod would find no libnccl.so.2.
if [ "${HOROVOD_GPU_OPERATIONS:-}" = NCCL ]; then
  nccl=$("$python" -c 'import nvidia.nccl; print(*nvidia.nccl.__path__)')
  mkdir "$scratch/nccl"
  ln -s "$nccl/lib/libnccl.so.2" "$scratch/nccl/libnccl.so"
  export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$scratch/nccl HOROVOD_NCCL_LINK=SHARED
  export LDFLAGS="-Wl,-rpath,$nccl/lib ${LDFLAGS:-}"
fi

# No isolation: the build has to see this environment's TensorFlow and setuptools. No cache, and in place of what is
# installed: a wheel built without MPI, or against another TensorFlow, has the same name.
pip=("$python" -m pip)
options=(--no-deps --no-build-isolation --no-cache-dir)
"${pip[@]}" download --quiet --require-hashes --no-binary horovod "${options[@]}" --dest "$scratch" \
  -r "$root/requirements/horovod.txt"
tar -xzf "$scratch"/horovod-*.tar.gz -C "$scratch"
source=$(echo "$scratch"/horovod-*[0-9])

# Two faults of 0.28.1 with Gloo: its stall check goes through a list of ranks that was reserved but never filled, and so
# finds none; and between hosts it forgets the network interface that it was given.
gloo=$source/horovod/common/gloo
sed -i 's/global_ranks_\.reserve(size_)/global_ranks_.resize(size_)/' "$gloo/gloo_controller.cc"
sed -i '/::InitializeForProcessSet/,$ s/= gloo_iface_;/= global_context.gloo_iface_;/' "$gloo/gloo_context.cc"
grep -q 'global_ranks_\.resize(size_)' "$gloo/gloo_controller.cc" && grep -q '= global_context\.gloo_iface_;' "$gloo/gloo_context.cc" ||
  { echo "$gloo: is not as in Horovod 0.28.1; see whether it still needs the two changes" >&2; exit 1; }

# Its store of keys and values, which anybody may read and write who reaches the launching host, unpickles what it is
# sent (CVE-2024-10190 in elastic runs, CVE-2026-31234). What elastic runs keep there are addresses and a key, which
# literals say as well; functions, of horovod.run, are refused by it from now on. With addresses and a key of his own
# somebody could still answer for a worker, so that the services' messages, too, are read as nothing but those.
runner=$source/horovod/runner
for file in http/http_client.py elastic/rendezvous.py; do
  sed -i 's/^from horovod\.runner\.common\.util import codec$/from ast import literal_eval/
    s/codec\.loads_base64(\(.*\))$/literal_eval(\1.decode())/
    s/codec\.dumps_base64(value, to_ascii=False)/repr(value).encode()/' "$runner/$file"
  ! grep -q codec "$runner/$file" && grep -q 'literal_eval(.*\.decode())' "$runner/$file" ||
    { echo "$runner/$file: is not as in Horovod 0.28.1; see whether it still unpickles what it is sent" >&2; exit 1; }
done
# Their one value that is no plain one, a flag, is sent as the number that it is.
network=$runner/common/util/network.py
sed -i 's/self\.res = res$/self.res = int(res)/' "$runner/elastic/worker.py"
sed -i 's/cloudpickle\.loads(message)/Messages(io.BytesIO(message)).load()/; s/^import pickle$/import io\n&/' "$network"
grep -q 'Messages(io' "$network" && ! grep -q '\.loads(' "$network" && grep -q 'int(res)' "$runner/elastic/worker.py" ||
  { echo "$network: is not as in Horovod 0.28.1; see whether it still unpickles whatever it is sent" >&2; exit 1; }
cat >>"$network" <<'PYTHON'


class Messages(pickle.Unpickler):
    """Reads the messages of the services."""

    def find_class(self, module, name):
        ours = module.startswith('horovod.runner.') and name.isidentifier()
        if ours and name.endswith(('Request', 'Response')):
            return super().find_class(module, name)
        raise pickle.UnpicklingError('{}.{}: is no message'.format(module, name))
PYTHON

# Its operations for XLA do not compile with TensorFlow 2.21; without GPUs that file is empty. Training calls none of them.
sed -i '/xla_mpi_ops\.cc/d' "$source/horovod/tensorflow/CMakeLists.txt"
# With GPUs it calls a function of TensorFlow's that 2.21 no longer has, so that no process could load it.
if [ "${HOROVOD_GPU_OPERATIONS:-}" = NCCL ]; then
  operations=$source/horovod/tensorflow/mpi_ops.cc
  declared='GpuStreamHandle AsGpuStreamValue(Stream\* stream);'
  defined='inline GpuStreamHandle stream_executor::gpu::AsGpuStreamValue(Stream* stream) {\n'
  defined+='  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n}'
  grep -q "^$declared" "$operations" || { echo "$operations: is not as in Horovod 0.28.1" >&2; exit 1; }
  sed -i "s/^$declared/inline &/; s|^#include \"tensorflow/compiler/xla/stream_executor/stream.h\"|&\n$defined|" "$operations"
fi

"${pip[@]}" install --force-reinstall "${options[@]}" "$source"
