#!/bin/bash
# Installs exabgp-rtbh on a host with systemd 247 and Python 3.9 or newer (Debian 11, Ubuntu 22.04, RHEL 9), as root.
# Run again, it upgrades: no configuration is changed, and nothing is restarted while blackholes are held.
#
#   systemd/install.sh --allowed "192.0.2.0/24 2001:db8::/32"
#   systemd/install.sh --uninstall            removes all but configuration, logs and state
#   DESTDIR=/staging systemd/install.sh       for packagers: the files alone
#
#   --allowed PREFIXES   your own prefixes: only these can be blackholed. Asked for at the first install. `any`: no
#                        such guard
#   --restart            restart the daemons after an upgrade even while blackholes are held: they end, unless
#                        rtbh.conf has `restore = always`
#   --python PATH        the Python to use (default: /usr/bin/python3)
#
# ExaBGP comes from PyPI; where that can't be reached, pip's own variables work: PIP_NO_INDEX=1
# PIP_FIND_LINKS=/directory/of/wheels (exabgp and hatchling, by `pip download exabgp hatchling`).
set -euo pipefail
umask 022 # what is installed must be readable by the services' user, whatever root's own is

source=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
root=${DESTDIR:-}
home=/opt/exabgp-rtbh
allowed='' named='' restart='' uninstall='' python=/usr/bin/python3
programs=(exabgp exabgpcli rtbh-controller rtbh-webhook)
units=(exabgp.service exabgp-webhook.service)

say() { echo "install.sh: $*"; }
die() { echo "install.sh: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
  case $1 in
    --allowed) [ $# -gt 1 ] || die "--allowed needs prefixes, such as --allowed 192.0.2.0/24"; allowed=$2 named=yes; shift ;;
    --python) [ $# -gt 1 ] || die "--python needs a path"; python=$2; shift ;;
    --restart) restart=yes ;;
    --uninstall) uninstall=yes ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "install.sh: unknown option $1; --help names them" >&2; exit 2 ;;
  esac
  shift
done

# Whether a link or unit of ours stands at a path: what somebody else put there is never overwritten, nor removed.
ours() { case $(readlink "$1" 2>/dev/null) in "$home"/*) true ;; *) false ;; esac; }
our_unit() { grep -q '^ExecReload=/etc/exabgp/' "$1" 2>/dev/null; }

remove() {
  say "stopping both services: every blackhole ends"
  for unit in exabgp-webhook.service exabgp.service; do
    ! our_unit "/etc/systemd/system/$unit" || { systemctl disable --quiet --now "$unit"; rm -f "/etc/systemd/system/$unit"; }
  done
  rm -f /etc/sysusers.d/exabgp-rtbh.conf /etc/tmpfiles.d/exabgp-rtbh.conf /etc/logrotate.d/exabgp-rtbh
  for link in "${programs[@]/#//usr/local/bin/}" \
    /etc/exabgp/{rtbh-controller.py,webhook-receiver.py}; do
    ! ours "$link" || rm -f "$link"
  done
  rm -rf "$home"
  systemctl daemon-reload
  say "removed. Left in place: /etc/exabgp, /var/log/exabgp, /var/lib/exabgp, the user exabgp"
}

if [ -z "$root" ]; then
  [ "$(id -u)" = 0 ] || die "must be run as root: sudo $0"
  command -v systemctl >/dev/null || die "there is no systemd on this host"
  version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
  [ "$version" -ge 247 ] || die "systemd $version is too old: 247 or newer is needed, for the token as a credential"
fi
if [ -n "$uninstall" ]; then
  remove
  exit 0
fi

# Everything that can be wrong is looked at before anything is changed.
[ -x "$python" ] || die "no Python at $python: install python3, or name another with --python"
case $(readlink -f "$python") in
  /home/* | /root/*) die "$python lies in a home directory, which the services can't see: name another with --python" ;;
esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || die "$python is older than 3.9: name another with --python"
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  command -v apt-get >/dev/null || die "$python can't make virtual environments (no module venv or ensurepip)"
  DEBIAN_FRONTEND=noninteractive apt-get -q install -y python3-venv >&2 || die "the package python3-venv is needed"
fi
for link in "${programs[@]/#/$root/usr/local/bin/}" "$root"/etc/exabgp/{rtbh-controller.py,webhook-receiver.py} \
  "${units[@]/#/$root/etc/systemd/system/}"; do
  { [ ! -e "$link" ] && [ ! -L "$link" ]; } || ours "$link" || our_unit "$link" ||
    die "$link is there already and not ours: move it away first"
done
if [ -z "$root" ]; then
  { [ ! -e /etc/exabgp ] || [ "$(stat -c %u /etc/exabgp)" = 0 ]; } ||
    die "/etc/exabgp belongs to $(stat -c %U /etc/exabgp), who could change what root runs: chown root: /etc/exabgp"
  unit=$(systemctl show --property=FragmentPath --value exabgp.service)
  { [ -z "$unit" ] || our_unit "$unit" || ! systemctl is-active --quiet exabgp.service; } ||
    die "another ExaBGP runs ($unit): systemctl disable --now exabgp"
  exec 9>/run/exabgp-rtbh-install.lock
  flock -n 9 || die "another install.sh is at work"
fi
if [ -e "$root/etc/exabgp/rtbh.conf" ]; then
  [ -z "$named" ] ||
    die "$root/etc/exabgp/rtbh.conf is there already, and stays as it is: set [safety] allowed there, leave out --allowed"
elif [ -z "$named" ] && [ -z "$root" ]; then
  [ -t 0 ] || die "name your own prefixes, which alone can then be blackholed: --allowed \"192.0.2.0/24 2001:db8::/32\""
  read -r -p "Your own prefixes, which alone can then be blackholed (any: no such guard): " allowed
  named=yes
fi
read -r -a prefixes <<<"${allowed//[,$'\n']/ }" # by spaces or commas
[ -z "$named" ] || [ ${#prefixes[@]} -gt 0 ] || die "no prefix was named (any: no such guard), nothing was changed"

# A new environment beside the old one, which a running ExaBGP goes on with.
new=$home/$(date -u +%Y%m%d-%H%M%S)-$$
trap 'rm -rf "$root$new"' EXIT
mkdir -p "$root$home"
"$python" -m venv "$root$new"
"$root$new/bin/pip" install --quiet --disable-pip-version-check "$source" || die "pip failed, nothing was changed"
if [ -n "$root" ]; then # it will be used elsewhere
  grep -rlI --null "$root" "$root$new/bin" "$root$new/pyvenv.cfg" | xargs -0 sed -i "s|$root||g"
fi
config=$root$new/rtbh.conf
sed 's/^token = /#&/; s|^#token_file = .*|&\n# Neither is set: the service passes /etc/exabgp/webhook-token.|' "$source/etc/rtbh.conf" >"$config"
if [ -n "$named" ] && [ "${prefixes[*]}" != any ]; then
  sed -i 's/^#allowed =$/allowed =/; /^#    192\.0\.2\.0\/24$/d; /^#    2001:db8::\/32$/d' "$config"
  for prefix in "${prefixes[@]}"; do sed -i "/^allowed =/a\\    ${prefix//[^0-9a-fA-F:.\/]/?}" "$config"; done
  "$root$new/bin/python" -m rtbh_controller --config "$config" --check >/dev/null || die "nothing was changed"
fi
# An upgrade: the new version must be able to start with the files as they are.
upgrade=''
if [ -z "$root" ] && our_unit /etc/systemd/system/exabgp.service && [ -e /etc/exabgp/rtbh.conf ]; then
  upgrade=yes
  mkdir "$new/credentials"
  ln -s /etc/exabgp/webhook-token "$new/credentials/rtbh-token"
  checks=("rtbh-controller --check")
  if "$new/bin/exabgp" version >/dev/null 2>&1; then # 4.2 knows no such word
    checks+=("exabgp validate /etc/exabgp/exabgp.conf")
  else
    checks+=("exabgp --validate /etc/exabgp/exabgp.conf")
  fi
  # (The receiver's own faults stop neither ExaBGP nor its blackholes.)
  ! systemctl is-enabled --quiet exabgp-webhook.service ||
    CREDENTIALS_DIRECTORY=$new/credentials "$new/bin/rtbh-webhook" --check >/dev/null || say "ATTENTION: see the line above"
  for check in "${checks[@]}"; do
    # shellcheck disable=SC2086 # a program and its words
    said=$("$new"/bin/$check 2>&1) ||
      die "the new version can't start with the files as they are, nothing was changed: $said"
  done
  rm -r "$new/credentials"
fi

if [ -z "$root" ]; then
  install -D -m 0644 "$source/systemd/exabgp-rtbh.sysusers.conf" /etc/sysusers.d/exabgp-rtbh.conf
  systemd-sysusers exabgp-rtbh.conf
fi
install -d "$root/etc/exabgp" "$root/usr/local/bin" "$root$new/etc"
install -m 0644 "$source"/etc/exabgp.conf "$source"/etc/exabgp.env "$source"/etc/rtbh.conf "$root$new/etc"
for file in exabgp.conf exabgp.env; do
  [ -e "$root/etc/exabgp/$file" ] || install -m 0640 "$source/etc/$file" "$root/etc/exabgp/$file"
done
[ -e "$root/etc/exabgp/rtbh.conf" ] || install -m 0640 "$config" "$root/etc/exabgp/rtbh.conf"
rm "$config"

old=$(readlink "$root$home/current" || true)
ln -sfn "$new" "$root$home/current.new"
mv -T "$root$home/current.new" "$root$home/current"
trap - EXIT
for program in "${programs[@]}"; do
  if [ -e "$root$new/bin/$program" ]; then
    ln -sfn "$home/current/bin/$program" "$root/usr/local/bin/$program"
  else
    rm -f "$root/usr/local/bin/$program" # of another version of ExaBGP
  fi
done
ln -sfn "$home/current/bin/rtbh-controller" "$root/etc/exabgp/rtbh-controller.py"
ln -sfn "$home/current/bin/rtbh-webhook" "$root/etc/exabgp/webhook-receiver.py"
for unit in "${units[@]}"; do install -D -m 0644 "$source/systemd/$unit" "$root/etc/systemd/system/$unit"; done
install -D -m 0644 "$source/systemd/exabgp-rtbh.sysusers.conf" "$root/etc/sysusers.d/exabgp-rtbh.conf"
install -D -m 0644 "$source/systemd/exabgp-rtbh.tmpfiles.conf" "$root/etc/tmpfiles.d/exabgp-rtbh.conf"
install -D -m 0644 "$source/etc/logrotate" "$root/etc/logrotate.d/exabgp-rtbh"
[ -z "$root" ] || exit 0

token=/etc/exabgp/webhook-token
[ -s $token ] || (umask 077 && head -c 24 /dev/urandom | base64 | tr '+/' '-_' >$token.new && mv $token.new $token)
systemd-tmpfiles --create exabgp-rtbh.conf
! command -v restorecon >/dev/null || restorecon -R "$home" /etc/exabgp
systemctl daemon-reload
if [ ! -e $home/enabled ]; then # once: what the operator disables later stays so
  [ -n "$upgrade" ] && systemctl is-enabled --quiet exabgp.service || systemctl enable --quiet "${units[@]}"
  touch $home/enabled
fi
grep -q 'rtbh-controller\.py' /etc/exabgp/exabgp.conf ||
  say "ATTENTION: /etc/exabgp/exabgp.conf does not run /etc/exabgp/rtbh-controller.py; $home/current/etc/exabgp.conf shows how"

# Environments of before, once nothing runs from them.
clean() { find "$home" -mindepth 1 -maxdepth 1 -type d ! -path "$new" ! -path "$old" -exec rm -rf {} +; }
if ! systemctl is-active --quiet exabgp.service; then
  say "installed. Edit /etc/exabgp/exabgp.conf (routers, AS numbers) and /etc/exabgp/rtbh.conf (whitelist), then:"
  say "  systemctl start exabgp exabgp-webhook"
  clean
  exit 0
fi
# What the controller says is announced, static routes and those of `exabgp cli` too: each is lost for a while.
held=$("$new/bin/python" -c '
import time
from rtbh_controller import load_settings, read_state
state = read_state(load_settings(None, ignore="webhook")[0].paths.state_file)
if abs(time.time() - state.get("heartbeat", 0)) < 3:
    print(len(state["routes"]))') || true
if [ "${held:-unknown}" = 0 ] || [ -n "$restart" ]; then
  say "upgraded; restarting both services"
  systemctl try-restart "${units[@]}"
  clean
else
  say "upgraded; nothing was restarted, since ${held:-an unknown number of} blackholes are held. A daemon that dies"
  say "comes back as the new version; all of it runs after"
  say "  systemctl restart exabgp      (which ends them, unless rtbh.conf has restore = always)"
fi
