# The assignments for the text of `uci export`.
{ sub(/^[ \t]+/, "") }
$1 == "config" { section = $3; gsub(/'/, "", section); if (section == "") section = "cfg" ++n; next }
$1 == "option" || $1 == "list" {
	key = $2
	sub(/^[^ ]+ [^ ]+ /, "")
	print "CONFIG_" section "_" key "=" $0
}
