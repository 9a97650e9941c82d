#!/bin/sh
# Holds as many MiB of anonymous memory as its argument says, until it is ended. dd's buffer is that memory: it is filled
# from /dev/zero, and its output is a pipe that nobody reads.
# shellcheck disable=SC2216
dd if=/dev/zero bs="$1M" count=1 2>/dev/null | sleep 1000000
