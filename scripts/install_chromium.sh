#!/usr/bin/env bash
# Installs Debian's Chromium and its driver, in which the tests open the page of rollout trees: as root on a system with
# apt, about 100 MB in half a minute. Elsewhere nothing happens; without a browser those tests are skipped.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup: no Chromium, and not root on a system with apt: tests of the rollout-tree viewer will be skipped" >&2
    exit 0
fi
echo "setup: installing Chromium"
export DEBIAN_FRONTEND=noninteractive
{ [ -n "$(apt-cache policy chromium-driver 2>/dev/null)" ] || timeout 120 apt-get update -qq; } >/dev/null 2>&1 || true
timeout 300 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null 2>&1 ||
    echo "setup: apt could not install it; tests of the rollout-tree viewer will be skipped" >&2
