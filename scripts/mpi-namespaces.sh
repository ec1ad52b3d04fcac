#!/usr/bin/env bash
# Runs an MPI program over machines that share nothing but a network: network namespaces of this one, each with a host name and addresses of
# its own. Messages go over one network, mpirun's own orders and the program's output over another. Needs root, iproute2 and Open MPI.
#
#     scripts/mpi-namespaces.sh MACHINES RANKS PROGRAM [ARGUMENT...]
#
# CUT=SECONDS takes the last machine off the network of messages after that time.
set -euo pipefail

machines=${1:?machines} ranks=${2:?ranks}
shift 2
name=star$$
work=$(mktemp -d)

cleanup() {
    trap '' INT TERM
    for ((i = 0; i < machines; i++)); do
        ip netns pids "$name-$i" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns delete "$name-$i" 2>/dev/null || true
    done
    ip link delete "$name.m" 2>/dev/null || true
    ip link delete "$name.o" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# A bridge is a switch; a pair of interfaces is a wire to it. eth0 for messages, eth1 for orders.
ip link add "$name.m" type bridge
ip link add "$name.o" type bridge
ip link set "$name.m" up
ip link set "$name.o" up
wire() { # machine, its interface, switch, address
    ip link add "$3$1" type veth peer name "$2" netns "$name-$1"
    ip link set "$3$1" master "$3" up
    ip -n "$name-$1" address add "$4" dev "$2"
    ip -n "$name-$1" link set "$2" up
}
hosts=
for ((i = 0; i < machines; i++)); do
    ip netns add "$name-$i"
    ip -n "$name-$i" link set lo up
    wire "$i" eth0 "$name.m" "10.77.0.$((i + 1))/24"
    wire "$i" eth1 "$name.o" "10.78.0.$((i + 1))/24"
    hosts+=${hosts:+,}10.78.0.$((i + 1)):$((ranks / machines + (i < ranks % machines)))
done

# What mpirun has in place of ssh: the address tells the namespace, and a host name of its own keeps Open MPI from shared memory between them.
cat >"$work/agent" <<AGENT
#!/usr/bin/env bash
number=\$((\${1##*.} - 1))
shift
exec ip netns exec $name-\$number unshare --uts sh -c "hostname machine-\$number && \$*"
AGENT
chmod +x "$work/agent"

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
if [ -n "${CUT:-}" ]; then
    (sleep "$CUT" && ip link set "$name.m$((machines - 1))" down) </dev/null >/dev/null 2>&1 &
fi
ip netns exec "$name-0" unshare --uts sh -c 'hostname machine-0 && exec "$@"' sh \
    mpirun --mca plm_rsh_agent "$work/agent" --mca btl tcp,self,vader --mca btl_tcp_if_include eth0 \
    --mca oob_tcp_if_include eth1 --host "$hosts" -n "$ranks" "$@" &
wait $!
