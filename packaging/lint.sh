#!/bin/bash
# What lintian and rpmlint say of packages; an error is one here, too.
#
#   packaging/lint.sh PACKAGE…
set -euo pipefail
here=$(dirname "$0")
for package in "$@"; do
    case $package in
        *.deb) lintian --fail-on error --allow-root "$package" ;;
        *.rpm) rpmlint --config "$here/rpm/rpmlint.toml" "$package" ;;
    esac
done
