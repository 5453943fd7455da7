#!/usr/bin/env bash
# attach.sh FOLDER TAG: attach the files of a finished release to a GitHub release (created as a draft if absent).
# Assets on GitHub have no folders, so the whole release goes into one archive, in parts if it exceeds the size limit of
# an asset. The same release gives the same bytes, except for run.json. Files that users download alone are also
# attached without the archive: the GGUF files, and the documents to verify the GGUF files.
set -euo pipefail

folder=$(cd "$1" && pwd)
tag=$2
name=$(basename "$folder")
most=1900 # MiB; assets are limited to 2 GiB
assets=$(mktemp -d)
trap 'rm -rf "$assets"' EXIT

tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u+rw,go+r,go-w \
    --directory "$(dirname "$folder")" "$name" | split --bytes="${most}M" --numeric-suffixes - "$assets/$name.tar."
if [ ! -e "$assets/$name.tar.01" ]; then
    mv "$assets/$name.tar.00" "$assets/$name.tar"
fi

for document in manifest.json SHA256SUMS provenance.intoto.json model.sig; do
    if [ -e "$folder/$document" ]; then
        cp "$folder/$document" "$assets/"
    fi
done
find "$folder" -name '*.gguf' -size "-${most}M" -exec cp --target-directory="$assets" {} +

gh release view "$tag" >/dev/null 2>&1 || gh release create "$tag" --draft --title "$tag" --notes ""
gh release upload "$tag" --clobber "$assets"/*
