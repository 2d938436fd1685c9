#!/usr/bin/env bash
# docs/images: the pages that README shows, as this version draws them. Needs the run of `make demo`, and chromium with
# Japanese type.
set -euo pipefail
cd "$(dirname -- "$0")/.."
run=runs/demo
[ -f "$run/report.html" ] || {
    printf 'error: %s/report.html is not there\n  fix: make demo\n' "$run" >&2
    exit 2
}
command -v chromium >/dev/null || {
    printf 'error: there is no chromium\n  fix: install it, with Japanese type (Debian: chromium fonts-noto-cjk)\n' >&2
    exit 2
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# picture NAME PAGE HEIGHT: the top of a page. Folders are told as they are seen from here.
picture() {
    sed "s|$PWD/||g" "$2" >"$scratch/$1.html"
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$scratch/profile" \
        --window-size="1100,$3" --screenshot="$scratch/$1.png" "file://$scratch/$1.html" 2>"$scratch/log" || { cat "$scratch/log" >&2; exit 1; }
    mkdir -p docs/images
    mv "$scratch/$1.png" docs/images/
    echo "docs/images/$1.png"
}

# Without what was measured of this machine.
SFT_DIST_CACHE=$scratch/cache .venv/bin/sft-dist plan configs/recipes/70b_lora_8xh100.yaml --examples 20k \
    --tokens-per-example 500 "output_dir=$scratch/run" --html "$scratch/page.html" >/dev/null
picture plan "$scratch/page.html" 950
.venv/bin/sft-dist data show "$run/config.yaml" --row 323 --row 1018 --html "$scratch/page.html" >/dev/null
picture rows "$scratch/page.html" 700
picture report "$run/report.html" 950
