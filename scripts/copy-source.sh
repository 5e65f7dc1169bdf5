#!/bin/sh
# copy-source.sh FROM TO FILE: gives apt the suite TO from wherever this machine gets its suite FROM. The machine's
# own source entry is copied with another name of suite, to FILE.sources or FILE.list, whichever format it has.
set -eu
from=$1 to=$2 file=$3
dir=/etc/apt/sources.list.d

for source in "$dir"/*.sources; do
    [ -e "$source" ] || continue
    # Entries are paragraphs. Comments in them would name the host for another suite.
    entry=$(awk -v RS= -v from="$from" '("\n" $0 "\n") ~ ("\nTypes:([^\n]* )?deb[ \n]") &&
        ("\n" $0 "\n") ~ ("\nSuites:([^\n]* )?" from "[ \n]") { print; exit }' "$source" | grep -v '^#' || true)
    if [ -n "$entry" ]; then
        echo "$entry" | sed "s/^Suites:.*/Suites: $to/" > "$file.sources"
        exit
    fi
done
entry=$(cat /etc/apt/sources.list "$dir"/*.list 2> /dev/null | grep -E "^deb .* $from +([a-z-]+ )*main" | head -n 1)
if [ -z "$entry" ]; then
    echo "setup: apt has no source of $from to take $to from" >&2
    exit 1
fi
echo "$entry" | sed "s| $from | $to |" > "$file.list"
