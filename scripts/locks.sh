#!/usr/bin/env bash
# Resolves the containers' Python packages into requirements/*.lock, with the hashes of all their
# files, and checks that each lock installs for its platform. From metadata alone: nothing big is
# downloaded. With "check" the locks stay; each must come out again as it is, hashes included.
# Usage: scripts/locks.sh [check]; PYTHON comes from the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."
check=${1:-}
tools=build/lock-tools work=build/lock-check
[ -x "$tools/bin/uv" ] || {
    "${PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/python" -m pip --disable-pip-version-check install --quiet "uv==0.13.9"
}
uv() { "$tools/bin/uv" --quiet --cache-dir build/lock-cache "$@"; }
rm -rf "$work" && mkdir -p "$work"

# The containers' Python and C library (Debian 12 has glibc 2.36).
common=(--python-version 3.12 --only-binary :all: --no-config)
options=(--generate-hashes --no-emit-index-url --custom-compile-command "make locks")
[ "$check" = check ] || options+=(--upgrade)

for target in thor:aarch64 x86:x86_64; do
    name=${target%%:*}
    platform=(--python-platform "${target##*:}-manylinux_2_35")
    locks=("$name.lock" "$name-tensorflow.lock")
    # The versions alone: uv would take the hashes over unseen.
    [ "$check" != check ] || for lock in "${locks[@]}"; do
        sed '/--hash=/d; s/ \\$//' "requirements/$lock" >"$work/$lock"
    done
    uv pip compile pyproject.toml --extra cuda --extra video "${common[@]}" "${platform[@]}" "${options[@]}" \
        --output-file "$work/${locks[0]}" >/dev/null
    # Only what TensorFlow adds, in versions that go with the lock above.
    echo "tensorflow>=2.16" | uv pip compile - --constraints "$work/${locks[0]}" \
        "${common[@]}" "${platform[@]}" "${options[@]}" --no-annotate \
        --output-file "$work/${locks[1]}" >/dev/null
    for lock in "${locks[@]}"; do
        uv pip install --dry-run --require-hashes --target "$work/none" \
            "${common[@]}" "${platform[@]}" --requirements "$work/$lock"
        if [ "$check" = check ]; then
            diff -u "requirements/$lock" "$work/$lock"
        else
            cp "$work/$lock" requirements/
        fi
        echo "requirements/$lock: $(grep -c '==' "$work/$lock") packages for ${platform[1]}"
    done
done
