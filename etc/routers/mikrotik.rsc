# RouterOS 7.20 or newer: the router's side of exabgp-rtbh. Put in your addresses and AS numbers, and your own prefixes.
# Written from the vendor's documentation; not run here.
# See: /routing/bgp/session/print
#      /routing/route/print detail where dst-address=192.0.2.100/32
#      /routing/route/print detail where dst-address=2001:db8::100/128
# Flags: A active, b BGP, B blackhole, F refused by the filter; bgp.communities shows the community.
#
# RouterOS up to 7.19 has no instances: leave that line out, and in place of instance=rtbh write as=65000
# router-id=198.51.100.1. Before 7.19, write address-families in place of afi as well.
#
# A prefix limit is left out: once input.limit-process-routes-ipv4 (or -ipv6) is reached, the session, and with it
# every mitigation, stays away until someone clears the flag limit-exceeded. [safety] max_routes of the sender's
# rtbh.conf holds the number down.

# Only single hosts inside our own prefixes, only with the community (BLACKHOLE, RFC 7999); everything else is
# refused. A blackhole drops packets without an ICMP message.
/routing/filter/rule
add chain=rtbh-in rule="if (dst in 192.0.2.0/24 && dst-len == 32 && bgp-communities includes 65535:666) \
    { append bgp-communities no-advertise; set blackhole yes; accept }"
add chain=rtbh-in rule="if (dst in 2001:db8::/32 && dst-len == 128 && bgp-communities includes 65535:666) \
    { append bgp-communities no-advertise; set blackhole yes; accept }"
add chain=rtbh-in rule="reject"

# This session exports nothing: without a chain RouterOS would advertise every active route.
add chain=rtbh-out rule="reject"

# The manual does not say that RouterOS itself obeys no-advertise. To keep blackholes from your other peers for
# certain, let this be the first rule of each one's output chain:
#   add chain=NAME rule="if (bgp-communities includes 65535:666) { reject }"

/routing/bgp/instance
add name=rtbh as=65000 router-id=198.51.100.1

# connect=no: ExaBGP connects. multihop=yes: the next hop of an IPv6 route on this IPv4 session is a discard address
# (100::1), on no link of ours, and would not be accepted.
/routing/bgp/connection
add name=exabgp-rtbh instance=rtbh comment="ExaBGP, remotely triggered black hole" \
    local.address=198.51.100.1 local.role=ebgp remote.address=198.51.100.10/32 remote.as=65001 \
    connect=no listen=yes multihop=yes afi=ip,ipv6 input.filter=rtbh-in output.filter-chain=rtbh-out
