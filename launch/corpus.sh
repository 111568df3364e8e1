#!/usr/bin/env bash
# Usage: launch/corpus.sh OUT_FOLDER
# Extracts the default corpus from the Debian packages dict-gcide, anarchism and wordnet-base:
# gcide.txt, anarchism.txt and wordnet.txt in OUT_FOLDER. UTF-8 prose, one paragraph a line,
# a blank line between documents (read them as text:FILE#blocks). Files that are there are kept.
set -euo pipefail
export LC_ALL=C
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
out=$1
gcide=/usr/share/dictd/gcide.dict.dz
anarchism=/usr/share/doc/anarchism/html
wordnet=/usr/share/wordnet
for need in "$gcide" "$anarchism/secA1.html" "$wordnet/data.noun"; do
  if [ ! -e "$need" ]; then
    echo "corpus.sh: $need is missing" >&2
    echo "install it: apt-get install dict-gcide anarchism wordnet-base" >&2
    exit 2
  fi
done

# A dictionary entry starts at a line whose first character is not a space and has its
# pronunciation between backslashes; that leaves out the licence headers. Wrapped lines are
# joined; pronunciations, etymologies, source tags and names of quoted authors dropped.
extract_gcide() {
  zcat "$gcide" |
    sed -E "s/\[(['\"\`^~=.-])([A-Za-z]{1,2})\]/\2/g; s/\[([A-Za-z])(mac|um|r|s)\]/\1/g
            s/\[(ae|oe|AE|OE)\]/\1/g; s/\[(eth|thorn)\]/th/g; s/\[deg\]/ degrees/g
            s/\[(root|asl|add|prime|bprime|dagger|[0-9]+)\]//g; s/[\x80-\xff]/'/g
            s/^( *\[[^]]*\]) +[A-Za-z][A-Za-z -]*$/\1/  # the next headword, alone after a tag
            :a; s/(\{[^{}]*)[*\"\`]([^{}]*\})/\1\2/; ta" |
    awk '
      function clean(t,   i) {
        gsub(/\\[^\\]*\\( *\([^()]*\))?/, " ", t)
        for (i = 0; i < 4; ++i) if (!gsub(/\[[^][]*\]/, " ", t)) break
        gsub(/[][{}\\]/, "", t)
        sub(/ +--[A-Z(][A-Za-z.,&() ]*$/, "", t)
        gsub(/ --((Sir|Bp\.|Dr\.|Mrs\.|Lord|J\.|Jer\.|B\.|T\.|W\.|H\.|Beau\.|Ld\.) )*[A-Z][a-z]+\.?/, "", t)
        gsub(/[ \t]+/, " ", t)
        gsub(/ ,/, ",", t); gsub(/ \./, ".", t); gsub(/ ;/, ";", t); gsub(/ \)/, ")", t)
        gsub(/,,+/, ",", t); gsub(/\.( \.)+$/, ".", t); gsub(/--( --)+/, "--", t)
        sub(/^[ ,;.]+/, "", t); sub(/[ -]+$/, "", t)
        return t
      }
      function paragraph() {
        text = clean(text)
        if (text ~ /[A-Za-z]/) entry = entry text "\n"
        text = ""
      }
      function flush() {
        paragraph()
        if (length(entry) >= 24) print entry
        entry = ""
      }
      /^[^ \t]/ { flush(); inside = index($0, "\\") > 1; text = inside ? $0 : ""; next }
      !inside { next }
      { sub(/^[ \t]+/, "") }
      $0 == "" { paragraph(); next }
      { text = text " " $0 }
      END { flush() }'
}

# A document is what follows a heading. Lists of links and books are left out.
extract_anarchism() {
  local file
  for file in "$anarchism"/*.html; do
    case ${file##*/} in
      alinks.html | arlinks.html | links.html | biblio.html | book.html | contact.html | \
        index.html | new.html | pdf.html) continue ;;
    esac
    cat "$file"
  done | awk '
    function flush() { if (length(section) >= 200) print section; section = "" }
    function paragraphs(html,   n, i, part, t) {
      gsub(/<a [^<>]*name=[^<>]*>/, "", html)
      gsub(/<h[1-6]( [^<>]*)?>/, "\n\001", html)
      gsub(/<br[^<>]*>/, " ", html)
      gsub(/<\/?(p|h[1-6]|blockquote|li|ul|ol|div|td|th|tr|table|center|hr|dt|dd)( [^<>]*)?\/?>/,
           "\n", html)
      gsub(/<\/?[A-Za-z][^<>]*>/, "", html)
      gsub(/&nbsp;/, " ", html); gsub(/&quot;/, "\"", html)
      gsub(/&lt;/, "<", html); gsub(/&gt;/, ">", html); gsub(/&amp;/, "\\&", html)
      n = split(html, part, "\n")
      for (i = 1; i <= n; ++i) {
        t = part[i]
        gsub(/[ \t\r]+/, " ", t); sub(/^ /, "", t); sub(/ $/, "", t)
        if (t ~ /^\001/) { flush(); sub(/^\001 ?/, "", t) }
        if (t ~ /[A-Za-z]/) section = section t "\n"
      }
    }
    # A paragraph is handed on as soon as its tags are closed, so that strings stay short.
    /<!DOCTYPE|<head>/ { skip = 1 }
    /<div id="book-navigation/ { skip = 1 }
    skip { if ($0 ~ /<\/head>|<\/html>/) skip = 0; next }
    { html = html $0 " " }
    /<\/(p|h[1-6]|li|td|blockquote|div)>/ { paragraphs(html); html = "" }
    /<\/body>/ { paragraphs(html); html = ""; flush() }
    END { paragraphs(html); flush() }'
}

# Line format (wndb): offset file type words-in-hex word id word id ... | gloss. A document is
# "dog, domestic dog: gloss".
extract_wordnet() {
  awk '
    function hex(s) { return 16 * (index("0123456789abcdef", substr(s, 1, 1)) - 1) + \
                             index("0123456789abcdef", substr(s, 2, 1)) - 1 }
    /^ / { next }  # the licence
    {
      bar = index($0, " | ")
      if (!bar) next
      n = hex($4)
      words = ""
      for (i = 0; i < n; ++i) {
        word = $(5 + 2 * i)
        sub(/\((a|p|ip)\)$/, "", word)
        words = words (i ? ", " : "") word
      }
      gsub(/_/, " ", words)
      gloss = substr($0, bar + 3)
      gsub(/[ \t]+/, " ", gloss); sub(/^ /, "", gloss); sub(/[ ;]+$/, "", gloss)
      if (gloss != "") print words ": " gloss "\n"
    }' "$wordnet"/data.{adj,adv,noun,verb}
}

mkdir -p "$out"
temporary=
trap '[ -z "$temporary" ] || rm -f "$temporary"' EXIT
for part in gcide anarchism wordnet; do
  [ ! -s "$out/$part.txt" ] || continue
  temporary=$(mktemp "$out/$part.txt.XXXXXX")
  "extract_$part" > "$temporary"
  chmod 0644 "$temporary"
  mv -f "$temporary" "$out/$part.txt"
  temporary=
done
