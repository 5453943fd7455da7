#!/usr/bin/env bash
# attach.sh FOLDER TAG: give the files of a finished release to a GitHub release, which is made as a draft if absent.
# A release on GitHub has no folders: all of it goes into one archive, the same bytes for the same release but for its
# run.json, in parts where it is larger than an asset may be. What is fetched alone lies beside it: the GGUF files, and
# the documents that tell whether they are whole.
set -euo pipefail

folder=$(cd "$1" && pwd)
tag=$2
name=$(basename "$folder")
most=1900 # MiB; an asset has to stay below 2 GiB
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
