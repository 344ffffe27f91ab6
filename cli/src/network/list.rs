//! `bulkhead network ls`.

use serde::Serialize;

use super::{
    BRIDGE, directory, interface_names,
    store::{State, Store},
};
use crate::{args::Format, error::Result, output};

/// A network that `--network` can name.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    interface: Option<&'static str>,
    /// Networks of the bridge; none as long as nobody is in it.
    subnets: Vec<String>,
    containers: Vec<Member>,
}

#[derive(Debug, Serialize)]
struct Member {
    id: String,
    ipv4: String,
    ipv6: Option<String>,
    ports: Vec<String>,
}

impl Row {
    fn bridge(state: Option<&State>) -> Row {
        let mut row = Row {
            name: "bridge",
            interface: Some(BRIDGE),
            subnets: Vec::new(),
            containers: Vec::new(),
        };
        let Some(state) = state else {
            return row;
        };
        let v6 = state.subnets.v6.map(|net| net.to_string());
        row.subnets = [Some(state.subnets.v4.to_string()), v6]
            .into_iter()
            .flatten()
            .collect();
        let members = state.leases.iter().map(|lease| {
            let own = state.subnets.of(lease.number);
            Member {
                id: lease.id.clone(),
                ipv4: own.v4.to_string(),
                ipv6: own.v6.map(|ip| ip.to_string()),
                ports: lease.ports.iter().map(ToString::to_string).collect(),
            }
        });
        row.containers = members.collect();
        row
    }
}

/// Prints all networks.
pub(super) fn list(format: Format) -> Result<u8> {
    let mut state = match Store::lock_if_there(&directory())? {
        Some(store) => store.load()?,
        None => None,
    };
    if let Some(state) = &mut state {
        let containers = std::path::Path::new(bulkhead_client::paths::CONTAINERS);
        state.forget_dead(containers, &interface_names()?);
    }
    let none = Row {
        name: "none",
        interface: None,
        subnets: Vec::new(),
        containers: Vec::new(),
    };
    let rows = [Row::bridge(state.as_ref()), none];
    output::print(format, rows.as_slice(), table)?;
    Ok(0)
}

/// A line for each container, and one for a network without.
fn table(rows: &[Row]) -> String {
    let mut table = output::columns(["NETWORK", "SUBNETS", "CONTAINER", "ADDRESSES", "PORTS"]);
    for row in rows {
        let of = [row.name.to_owned(), row.subnets.join(", ")];
        if row.containers.is_empty() {
            table.add_row(of.clone());
        }
        for member in &row.containers {
            let v6 = member.ipv6.as_ref().map(|ip| format!(", {ip}"));
            let addresses = format!("{}{}", member.ipv4, v6.unwrap_or_default());
            let its = [member.id.clone(), addresses, member.ports.join(", ")];
            table.add_row(of.clone().into_iter().chain(its));
        }
    }
    output::text(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::state;

    #[test]
    fn the_table_has_a_line_for_each_container() {
        let state = state();
        let text = table(&[Row::bridge(Some(&state))]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].contains("10.91.0.2, fd01:203:405::2"), "{text}");
        assert!(
            lines[1].contains("127.0.0.1:8080:80/tcp, 53:53/udp"),
            "{text}"
        );
        let text = table(&[Row::bridge(None)]);
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
