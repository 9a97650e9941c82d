#!/bin/bash
# Makes a Debian package of what `make install` has put into a folder.
#
#   packaging/deb/build.sh STAGE VERSION OUT     OUT/agentd_VERSION-1_ARCHITECTURE.deb
set -euo pipefail
umask 022
here=$(dirname "$0")
stage=$1 version=$2 out=$3

package=$(dpkg-parsechangelog -l "$here/changelog" -S Version)
if [ "${package%-*}" != "$version" ]; then
    echo "packaging/deb/changelog is of $package, Cargo.toml of $version" >&2
    exit 1
fi
architecture=$(dpkg --print-architecture)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
cp -a "$stage/." "$tree"
chmod 755 "$tree"

# What Debian has elsewhere, or otherwise.
doc=$tree/usr/share/doc/agentd
rm "$doc/LICENSE"
install -m 644 "$here/../copyright" "$doc/copyright"
mv "$doc/CHANGELOG.md" "$doc/changelog"
install -m 644 "$here/changelog" "$doc/changelog.Debian"
install -D -m 644 "$here/lintian-overrides" "$tree/usr/share/lintian/overrides/agentd"
mkdir -p "$tree/usr/share/zsh/vendor-completions"
mv "$tree/usr/share/zsh/site-functions/_ctl" "$tree/usr/share/zsh/vendor-completions/"
rmdir "$tree/usr/share/zsh/site-functions"
find "$tree/usr/share/man" "$doc/changelog" "$doc/changelog.Debian" -type f -exec gzip -9n {} +

mkdir "$tree/DEBIAN"
(cd "$tree" && find usr -type f -exec md5sum {} + | sort -k 2 >DEBIAN/md5sums)
echo /etc/agentd/agentd.toml >"$tree/DEBIAN/conffiles"
size=$(du -sk --exclude=DEBIAN "$tree" | cut -f 1)
sed -e "s/@VERSION@/$package/; s/@ARCHITECTURE@/$architecture/; s/@SIZE@/$size/" "$here/control" >"$tree/DEBIAN/control"
install -m 755 "$here/postinst" "$here/prerm" "$here/postrm" "$tree/DEBIAN/"
mkdir -p "$out"
dpkg-deb --root-owner-group --build "$tree" "$out/agentd_${package}_$architecture.deb"
