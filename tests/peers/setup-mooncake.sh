#!/usr/bin/env bash
# Official Mooncake release (PyPI wheel, build without CUDA) in its own environment.
#
# usage: tests/peers/setup-mooncake.sh [FOLDER]     default: $TIDEWIRE_PEERS_DIR/mooncake/venv
#
# Holds the Python module `mooncake.engine`, `transfer_engine_bench` and `mooncake_http_metadata_server`. The tests find
# it through TIDEWIRE_TEST_MOONCAKE_VENV. The wheel needs libibverbs, librdmacm, libnuma and libcurl (tests/install.sh).
set -euo pipefail
source "$(dirname "$0")/lib.sh"
version=0.3.13.post1
folder=${1:-$(peers_dir)/mooncake/venv}

works() { "$folder/bin/python" -c 'import mooncake.engine, importlib.metadata as m; assert m.version("mooncake-transfer-engine-non-cuda") == "'$version'"' >/dev/null 2>&1; }
if works; then exit 0; fi
python=$(pick_python 10 13) || { echo "mooncake $version has wheels for Python 3.10 to 3.13 only, and none is here" >&2; exit 1; }
echo "installing mooncake-transfer-engine-non-cuda $version for $("$python" -V)"
make_venv "$folder" "$python" "mooncake-transfer-engine-non-cuda==$version" aiohttp || { echo "the Mooncake wheel cannot be installed" >&2; exit 1; }
chmod +x "$folder"/lib/python3*/site-packages/mooncake/transfer_engine_bench
if ! works; then
    echo "the Mooncake wheel does not load:" >&2
    "$folder/bin/python" -c 'import mooncake.engine' >&2 || true
    exit 1
fi
