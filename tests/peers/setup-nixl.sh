#!/usr/bin/env bash
# NIXL release (PyPI wheel with its own UCX) in its own environment; host memory only, so neither torch nor CUDA.
#
# usage: tests/peers/setup-nixl.sh [FOLDER]     default: $TIDEWIRE_PEERS_DIR/nixl/venv
set -euo pipefail
source "$(dirname "$0")/lib.sh"
version=1.5.1
folder=${1:-$(peers_dir)/nixl/venv}

works() { "$folder/bin/python" -c 'import numpy, nixl_cu12._api, importlib.metadata as m; assert m.version("nixl-cu12") == "'$version'"' >/dev/null 2>&1; }
if works; then exit 0; fi
python=$(pick_python 10 13) || { echo "nixl $version has wheels for Python 3.10 to 3.13 only, and none is here" >&2; exit 1; }
echo "installing nixl-cu12 $version for $("$python" -V)"
make_venv "$folder" "$python" numpy || { echo "numpy cannot be installed" >&2; exit 1; }
"$folder/bin/python" -m pip install -q --disable-pip-version-check --no-deps "nixl-cu12==$version" || { rm -rf "$folder"; exit 1; }
if ! works; then
    echo "the NIXL wheel does not load:" >&2
    "$folder/bin/python" -c 'import numpy, nixl_cu12._api' >&2 || true
    exit 1
fi
