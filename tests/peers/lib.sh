# Shared by the set-up scripts of the peers; sourced, not run.
#
# The peers' environments live in $TIDEWIRE_PEERS_DIR (default: .cache/peers of the checkout, which git ignores), one
# folder per peer, and are reused while their stamp names the same release.

peers_dir() {
    local here; here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    echo "${TIDEWIRE_PEERS_DIR:-$here/.cache/peers}"
}

# pick_python MIN MAX : prints the first interpreter 3.MIN..3.MAX that can make a virtual environment
pick_python() {
    local minor name
    for name in python3 /usr/bin/python3 $(seq -f 'python3.%g' "$2" -1 "$1"); do
        command -v "$name" >/dev/null 2>&1 || continue
        minor=$("$name" -c 'import sys, ensurepip, venv; print(sys.version_info[1])' 2>/dev/null) || continue
        if [ "$minor" -ge "$1" ] && [ "$minor" -le "$2" ]; then
            echo "$name"
            return 0
        fi
    done
    return 1
}

# make_venv FOLDER PYTHON REQUIREMENT... : a fresh environment with the requirements, or nothing at all
make_venv() {
    local folder=$1 python=$2; shift 2
    rm -rf "$folder"
    mkdir -p "$(dirname "$folder")"
    if ! "$python" -m venv "$folder" || ! "$folder/bin/python" -m pip install -q --disable-pip-version-check "$@"; then
        rm -rf "$folder"
        return 1
    fi
}
