//! The RAM blocks of a running QEMU, as `info ramblock` lists them.

use serde_json::json;

use crate::qmp::{Begun, Client};
use crate::{Error, Kind, Result};

/// A RAM block as QEMU's monitor shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBlock {
    /// QEMU's idstr, for example `pc.ram`.
    pub name: String,
    /// The host's page size behind it, in bytes.
    pub page_size: u64,
    /// Where QEMU has it in its own count of all RAM, in bytes.
    pub offset: u64,
    /// The used length in bytes.
    pub used_length: u64,
    /// The length in bytes that it may grow to; all of it is mapped in QEMU's process.
    pub total_length: u64,
    /// The host virtual address in QEMU's process; QEMU tells it since 8.0, [`super::with_addresses`] finds it
    /// before.
    pub address: Option<u64>,
}

/// The question which RAM blocks a QEMU has.
#[derive(Debug)]
pub struct AskedBlocks(Begun);

/// Asks for the RAM blocks, by the command of QEMU 6.2 and later that says the same in fewer words: QEMU takes a command in
/// byte by byte.
///
/// # Errors
/// As every QMP command.
pub fn ask_host_blocks(client: &mut Client) -> Result<AskedBlocks> {
    client.begin("x-query-ramblock", json!({})).map(AskedBlocks)
}

impl AskedBlocks {
    /// Waits for the answer, in QEMU's order.
    ///
    /// # Errors
    /// As [`host_blocks`].
    pub fn answered(self, client: &mut Client) -> Result<Vec<HostBlock>> {
        match client.end(self.0) {
            Ok(answer) => parse(answer["human-readable-text"].as_str().unwrap_or_default()),
            Err(error) if error.is_refusal() => parse(&client.human("info ramblock")?),
            Err(error) => Err(error),
        }
    }
}

/// Lists the RAM blocks, in QEMU's order.
///
/// # Errors
/// As every QMP command; [`Kind::Peer`] where the table has an unknown form.
pub fn host_blocks(client: &mut Client) -> Result<Vec<HostBlock>> {
    ask_host_blocks(client)?.answered(client)
}

/// Parses the table of `info ramblock` (system/physmem.c:ram_block_format, QEMU 10.0). The name may hold
/// blanks, so rows are read from the right.
fn parse(table: &str) -> Result<Vec<HostBlock>> {
    let mut lines = table.lines();
    let unknown = |line: &str| {
        Error::new(Kind::Peer, format!("QEMU's `info ramblock` has an unknown form: `{}`", line.trim()))
    };
    let head = lines.next().unwrap_or_default();
    if !head.contains("Block Name") || !head.contains("Used") {
        return Err(unknown(head));
    }
    // Two columns more since 8.0: HVA and RO.
    let with_address = head.contains("HVA");
    lines
        .filter(|line| !line.trim().is_empty())
        .map(|line| row(line.trim(), with_address).ok_or_else(|| unknown(line)))
        .collect()
}

fn row(line: &str, with_address: bool) -> Option<HostBlock> {
    let mut rest = line;
    let mut column = || {
        let (before, last) = rest.trim_end().rsplit_once(char::is_whitespace)?;
        rest = before;
        Some(last)
    };
    let address = if with_address {
        column()?;
        Some(hex(column()?)?)
    } else {
        None
    };
    let total_length = hex(column()?)?;
    let used_length = hex(column()?)?;
    let offset = hex(column()?)?;
    let unit = match column()? {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    let page_size = column()?.parse::<u64>().ok()?.checked_shl(unit)?;
    let name = rest.trim();
    (!name.is_empty()).then(|| HostBlock {
        name: name.to_owned(),
        page_size,
        offset,
        used_length,
        total_length,
        address,
    })
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From QEMU 10.0.2 with `-M q35 -m 1G`, shortened.
    const TABLE_10_0: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f138fe00000  rw
                huge ram    2 MiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f138fe00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000040080000 0x0000000000020000 0x0000000000200000 0x00007f141d800000  ro
";

    /// From QEMU 7.2, shortened.
    const TABLE_7_2: &str = "\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
";

    #[test]
    fn the_tables_of_both_generations_are_read() {
        let blocks = parse(TABLE_10_0).unwrap();
        let rows: Vec<_> =
            blocks.iter().map(|b| (b.name.as_str(), b.page_size, b.used_length, b.address)).collect();
        assert_eq!(
            rows,
            [
                ("pc.ram", 4096, 0x4000_0000, Some(0x7f13_8fe0_0000)),
                ("huge ram", 2 << 20, 0x4000_0000, Some(0x7f13_8fe0_0000)),
                ("/rom@etc/acpi/tables", 4096, 0x2_0000, Some(0x7f14_1d80_0000)),
            ]
        );
        let blocks = parse(TABLE_7_2).unwrap();
        assert_eq!(blocks.len(), 1);
        assert_eq!((blocks[0].used_length, blocks[0].address), (0x400_0000, None));
    }

    #[test]
    fn an_unknown_table_is_refused() {
        for table in ["", "nothing here", "Block Name Used\npc.ram what 0x1"] {
            assert_eq!(parse(table).unwrap_err().kind(), Kind::Peer, "{table}");
        }
    }
}
