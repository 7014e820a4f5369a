#!/usr/bin/env bash
# Take README's picture of the run report, with Chromium and the report of `make demo`:
#   docs/images/report.sh [REPORT.html]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
report=$(realpath "${1:-runs/demo/report.html}")
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=940,1800 \
  --screenshot="$here/report.png" "file://$report" 2> /dev/null
echo "$here/report.png"
