# A double of OpenWrt's /lib/functions.sh: what packages and init scripts use of it, with the same outcome.

config_load() { eval "$(uci -q export "$1" | awk -f /lib/config.awk)"; }

# config_get VARIABLE SECTION OPTION [DEFAULT]
config_get() { eval "$1=\${CONFIG_$2_$3:-\$4}"; }

config_get_bool() {
	config_get "$1" "$2" "$3" "$4"
	eval "case \$$1 in 1|on|true|yes|enabled) $1=1 ;; 0|off|false|no|disabled) $1=0 ;; *) $1=\$4 ;; esac"
}

list_contains() {
	eval "case \" \$$1 \" in *\" $2 \"*) return 0 ;; esac"
	return 1
}

add_group_and_user() { :; }

_of_package() {
	pkgname=${pkgname:-$(basename "${1%.*}")}
	list=/usr/lib/opkg/info/$pkgname.list
}

default_postinst() {
	local i list
	_of_package "$1"
	for i in $(grep -s '^/etc/init.d/' "$list"); do
		[ "$PKG_UPGRADE" = 1 ] || "$i" enable
		"$i" start
	done
}

# First what the package says, then the init scripts.
default_prerm() {
	local i list ret=0
	_of_package "$1"
	if [ -f "/usr/lib/opkg/info/$pkgname.prerm-pkg" ]; then
		( . "/usr/lib/opkg/info/$pkgname.prerm-pkg" )
		ret=$?
	fi
	for i in $(grep -s '^/etc/init.d/' "$list"); do
		[ "$PKG_UPGRADE" = 1 ] || "$i" disable
		"$i" stop
	done
	return $ret
}
