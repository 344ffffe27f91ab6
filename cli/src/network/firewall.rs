//! The table of nf_tables that is ours: translation of addresses, and what keeps closed what
//! was closed before. It is always written as a whole, in one transaction of the kernel.

use std::{io, net::IpAddr};

use ipnet::IpNet;
use nftables::{
    batch::Batch,
    expr::{
        BinaryOperation, CT, Expression, Fib, FibFlag, FibResult, Meta, MetaKey, NamedExpression,
        Payload, PayloadField, Prefix,
    },
    helper::{self, NftablesError},
    schema::{Chain, NfListObject, Nftables, Rule, Table},
    stmt::{JumpTarget, Match, NAT, NATFamily, Operator, Statement},
    types::{NfChainPolicy, NfChainType, NfFamily, NfHook},
};

use super::{
    BRIDGE,
    addresses::Subnets,
    store::{Lease, State},
};
use crate::args::network::Publish;

const TABLE: &str = "bulkhead";
const FAMILY: NfFamily = NfFamily::INet;

/// The kernel's names for places in the order of its tables.
const RAW: i32 = -300;
const DSTNAT: i32 = -100;
const FILTER: i32 = 0;
const SRCNAT: i32 = 100;

type Words = Vec<Statement<'static>>;

/// Puts the table into the kernel, in place of what is there.
pub(super) fn apply(state: &State, opened: &(Vec<String>, bool)) -> io::Result<()> {
    helper::apply_ruleset(&table(state, opened)).map_err(failed)
}

/// Takes it away.
pub(super) fn remove() -> io::Result<()> {
    let mut batch = Batch::new();
    gone(&mut batch);
    match helper::apply_ruleset(&batch.to_nftables()).map_err(failed) {
        // Without the program there never was a table.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn failed(error: NftablesError) -> io::Error {
    match error {
        NftablesError::NftExecution { inner, .. } if inner.kind() == io::ErrorKind::NotFound => {
            io::Error::new(
                io::ErrorKind::NotFound,
                "there is no program nft; install the package nftables",
            )
        }
        NftablesError::NftFailed { stderr, .. } => {
            let line = stderr.lines().next().unwrap_or_default();
            io::Error::other(format!("nft: {}", line.trim()))
        }
        other => io::Error::other(other.to_string()),
    }
}

/// What makes the kernel have the table as it shall be.
fn table(state: &State, (v4, v6): &(Vec<String>, bool)) -> Nftables<'static> {
    let mut batch = Batch::new();
    gone(&mut batch);
    batch.add(own_table());
    let mut chain = |name: &'static str, kind: Option<(NfChainType, NfHook, i32)>, rules| {
        let (_type, hook, prio) = match kind {
            Some((kind, hook, prio)) => (Some(kind), Some(hook), Some(prio)),
            None => (None, None, None),
        };
        batch.add(NfListObject::Chain(Chain {
            family: FAMILY,
            table: TABLE.into(),
            name: name.into(),
            policy: hook.map(|_| NfChainPolicy::Accept),
            _type,
            hook,
            prio,
            ..Chain::default()
        }));
        for words in rules {
            let words: Words = words;
            batch.add(NfListObject::Rule(Rule {
                family: FAMILY,
                table: TABLE.into(),
                chain: name.into(),
                expr: words.into(),
                ..Rule::default()
            }));
        }
    };
    let nat = |hook, place| Some((NfChainType::NAT, hook, place));
    let filter = |hook, place| Some((NfChainType::Filter, hook, place));
    chain("ports", None, ports(state));
    let to_ports = || vec![vec![is(local(), "local"), jump("ports")]];
    chain("prerouting", nat(NfHook::Prerouting, DSTNAT), to_ports());
    chain("output", nat(NfHook::Output, DSTNAT), to_ports());
    let rules = translated(&state.subnets);
    chain("postrouting", nat(NfHook::Postrouting, SRCNAT), rules);
    // That the bridge knows 127.0.0.1 as an address like others is for the host alone: not
    // for containers, and not for neighbours of the host who ask for a port there.
    let loopback = is_in(
        ip("daddr", true),
        IpNet::new_assert([127, 0, 0, 0].into(), 8),
    );
    let rules = vec![vec![is_not(meta(MetaKey::Iifname), "lo"), loopback, drop()]];
    chain("raw", filter(NfHook::Prerouting, RAW), rules);
    let rules = forwarded(&state.subnets, v4, *v6);
    chain("forward", filter(NfHook::Forward, FILTER), rules);
    batch.to_nftables()
}

/// Ports of the host.
fn ports(state: &State) -> Vec<Words> {
    // What is asked for at ::1 or a link's address cannot be sent on from there.
    let mut rules: Vec<Words> = ["::1/128", "fe80::/10"]
        .iter()
        .filter_map(|net| net.parse().ok())
        .map(|net| vec![is_in(ip("daddr", false), net), Statement::Return(None)])
        .collect();
    for lease in &state.leases {
        for port in &lease.ports {
            rules.extend(port_rules(state, lease, port));
        }
    }
    rules
}

fn port_rules(state: &State, lease: &Lease, port: &Publish) -> Vec<Words> {
    let own = state.subnets.of(lease.number);
    let ends = [Some(IpAddr::V4(own.v4)), own.v6.map(IpAddr::V6)];
    let ends = ends.into_iter().flatten();
    let ends = ends.filter(|end| port.ip.is_none_or(|ip| ip.is_ipv4() == end.is_ipv4()));
    let rule = |end: IpAddr| {
        let is_v4 = end.is_ipv4();
        let mut words = vec![family(is_v4)];
        if let Some(ip) = port.ip.filter(|ip| !ip.is_unspecified()) {
            words.push(is(self::ip("daddr", is_v4), &ip.to_string()));
        }
        words.push(matches(
            payload(port.protocol.name(), "dport"),
            Operator::EQ,
            Expression::Number(port.host.into()),
        ));
        words.push(Statement::DNAT(Some(NAT {
            addr: Some(text(&end.to_string())),
            family: Some(if is_v4 { NATFamily::IP } else { NATFamily::IP6 }),
            port: Some(Expression::Number(port.container.into())),
            flags: None,
        })));
        words
    };
    ends.map(rule).collect()
}

/// Who seems to be the host.
fn translated(subnets: &Subnets) -> Vec<Words> {
    let mut rules = Vec::new();
    let out = || meta(MetaKey::Oifname);
    for net in nets(subnets) {
        let is_v4 = matches!(net, IpNet::V4(_));
        let from = || is_in(ip("saddr", is_v4), net);
        rules.push(vec![from(), is_not(out(), BRIDGE), masquerade()]);
        // A container that asks for another one by a port of the host.
        let sent_on = matches(ct("status"), Operator::IN, text("dnat"));
        rules.push(vec![from(), is(out(), BRIDGE), sent_on, masquerade()]);
    }
    // The host that asks for a port at 127.0.0.1.
    let loopback = IpNet::new_assert([127, 0, 0, 0].into(), 8);
    let from = is_in(ip("saddr", true), loopback);
    rules.push(vec![is(out(), BRIDGE), from, masquerade()]);
    rules
}

/// What passes the host: to containers answers and published ports, from them what has
/// their address; between others what did before.
fn forwarded(subnets: &Subnets, v4: &[String], v6: bool) -> Vec<Words> {
    let (inn, out) = (|| meta(MetaKey::Iifname), || meta(MetaKey::Oifname));
    let new = || matches(ct("state"), Operator::IN, text("new"));
    let sent_on = Statement::Match(Match {
        left: Expression::BinaryOperation(Box::new(BinaryOperation::AND(
            ct("status"),
            text("dnat"),
        ))),
        right: Expression::Number(0),
        op: Operator::EQ,
    });
    let into = || [is_not(inn(), BRIDGE), is(out(), BRIDGE)];
    // What belongs to no connection has no status, either.
    let without = ["invalid", "untracked"].map(text).to_vec();
    let without = matches(ct("state"), Operator::IN, Expression::List(without));
    let mut rules: Vec<Words> = vec![
        into().into_iter().chain([without, drop()]).collect(),
        into().into_iter().chain([new(), sent_on, drop()]).collect(),
    ];
    for net in nets(subnets) {
        let is_v4 = matches!(net, IpNet::V4(_));
        let other = matches(ip("saddr", is_v4), Operator::NEQ, prefix(net));
        rules.push(vec![
            is(inn(), BRIDGE),
            is_not(out(), BRIDGE),
            other,
            drop(),
        ]);
    }
    for name in v4 {
        let rule = vec![
            is(inn(), name),
            is_not(out(), BRIDGE),
            family(true),
            new(),
            drop(),
        ];
        rules.push(rule);
    }
    if v6 {
        let other = [is_not(inn(), BRIDGE), is_not(out(), BRIDGE)];
        let rule = other.into_iter().chain([family(false), new(), drop()]);
        rules.push(rule.collect());
    }
    rules
}

fn nets(subnets: &Subnets) -> Vec<IpNet> {
    let v4 = IpNet::V4(subnets.v4);
    [Some(v4), subnets.v6.map(IpNet::V6)]
        .into_iter()
        .flatten()
        .collect()
}

fn own_table() -> NfListObject<'static> {
    NfListObject::Table(Table {
        family: FAMILY,
        name: TABLE.into(),
        handle: None,
    })
}

/// Deletes the table, which may not be there.
fn gone(batch: &mut Batch<'static>) {
    batch.add(own_table());
    batch.delete(own_table());
}

fn matches(
    left: Expression<'static>,
    op: Operator,
    right: Expression<'static>,
) -> Statement<'static> {
    Statement::Match(Match { left, right, op })
}

fn is(left: Expression<'static>, right: &str) -> Statement<'static> {
    matches(left, Operator::EQ, text(right))
}

fn is_not(left: Expression<'static>, right: &str) -> Statement<'static> {
    matches(left, Operator::NEQ, text(right))
}

fn is_in(left: Expression<'static>, net: IpNet) -> Statement<'static> {
    matches(left, Operator::EQ, prefix(net))
}

fn family(is_v4: bool) -> Statement<'static> {
    is(meta(MetaKey::Nfproto), if is_v4 { "ipv4" } else { "ipv6" })
}

fn text(text: &str) -> Expression<'static> {
    Expression::String(text.to_owned().into())
}

fn prefix(net: IpNet) -> Expression<'static> {
    Expression::Named(NamedExpression::Prefix(Prefix {
        addr: Box::new(text(&net.addr().to_string())),
        len: net.prefix_len().into(),
    }))
}

fn payload(protocol: &'static str, field: &'static str) -> Expression<'static> {
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(
        PayloadField {
            protocol: protocol.into(),
            field: field.into(),
        },
    )))
}

fn ip(field: &'static str, is_v4: bool) -> Expression<'static> {
    payload(if is_v4 { "ip" } else { "ip6" }, field)
}

fn meta(key: MetaKey) -> Expression<'static> {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn ct(key: &'static str) -> Expression<'static> {
    Expression::Named(NamedExpression::CT(CT {
        key: key.into(),
        family: None,
        dir: None,
    }))
}

/// What the host takes the destination for.
fn local() -> Expression<'static> {
    Expression::Named(NamedExpression::Fib(Fib {
        result: FibResult::Type,
        flags: [FibFlag::Daddr].into(),
    }))
}

fn jump(target: &'static str) -> Statement<'static> {
    Statement::Jump(JumpTarget {
        target: target.into(),
    })
}

fn drop() -> Statement<'static> {
    Statement::Drop(None)
}

fn masquerade() -> Statement<'static> {
    Statement::Masquerade(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::state;

    #[test]
    fn the_table_is_as_it_was_looked_at() {
        let opened = (vec!["eth0".to_owned()], true);
        let table = serde_json::to_value(table(&state(), &opened)).unwrap();
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("firewall.json")).unwrap();
        let text = serde_json::to_string_pretty(&table).unwrap();
        assert_eq!(table, golden, "{text}");
    }
}
