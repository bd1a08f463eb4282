//! Sizes and rates as text: the units of the benchmark's report, and sizes for people.

/// Unit of a throughput report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportUnit {
    name: &'static str,
    /// Bits for a unit in bits, bytes otherwise.
    per_unit: u64,
    bits: bool,
}

const UNITS: [ReportUnit; 9] = [
    ReportUnit { name: "GB", per_unit: 1_000_000_000, bits: false },
    ReportUnit { name: "GiB", per_unit: 1 << 30, bits: false },
    ReportUnit { name: "Gb", per_unit: 1_000_000_000, bits: true },
    ReportUnit { name: "MB", per_unit: 1_000_000, bits: false },
    ReportUnit { name: "MiB", per_unit: 1 << 20, bits: false },
    ReportUnit { name: "Mb", per_unit: 1_000_000, bits: true },
    ReportUnit { name: "KB", per_unit: 1_000, bits: false },
    ReportUnit { name: "KiB", per_unit: 1 << 10, bits: false },
    ReportUnit { name: "Kb", per_unit: 1_000, bits: true },
];

impl ReportUnit {
    /// The unit with this name; upper and lower case matter (`GB` is bytes, `Gb` bits).
    pub fn parse(name: &str) -> Option<Self> {
        UNITS.into_iter().find(|unit| unit.name == name)
    }

    /// GB, the default.
    pub fn gigabytes() -> Self {
        UNITS[0]
    }

    /// A rate, as `0.56 GB/s`.
    pub fn rate(self, bytes_per_second: f64, precision: usize) -> String {
        let amount = bytes_per_second * if self.bits { 8.0 } else { 1.0 } / self.per_unit as f64;
        format!("{amount:.precision$} {}/s", self.name)
    }
}

/// A size for people: the largest power-of-1024 unit that leaves at least 1.
pub fn binary_size(bytes: u64) -> String {
    const NAMES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let exponent = (bytes.max(1).ilog2() / 10).min(4);
    let amount = bytes as f64 / (1u64 << (10 * exponent)) as f64;
    let name = NAMES[exponent as usize];
    if amount.fract() == 0.0 { format!("{amount:.0} {name}") } else { format!("{amount:.1} {name}") }
}

/// Reads a size such as `4096`, `64k`, `64KiB`, `1M` or `2GiB`; k, M and G are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return Err(format!("{text:?} is no size: use bytes, or a number with K, M or G")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no size: it starts with no number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_their_unit() {
        let rate = |name, precision| ReportUnit::parse(name).map(|unit| unit.rate(1.5e9, precision));
        assert_eq!(rate("GB", 2).as_deref(), Some("1.50 GB/s"));
        assert_eq!(rate("Gb", 1).as_deref(), Some("12.0 Gb/s"));
        assert_eq!(rate("MiB", 0).as_deref(), Some("1431 MiB/s"));
        assert_eq!(rate("KB", 0).as_deref(), Some("1500000 KB/s"));
        assert_eq!(rate("gb", 2), None);
    }

    #[test]
    fn sizes_are_read_and_written() {
        let expected =
            [("4096", 4096), ("64k", 65536), ("64KiB", 65536), ("1M", 1 << 20), ("2GiB", 2 << 30), ("8b", 8)];
        for (text, bytes) in expected {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "1x", "-1", "99999999999999G", "1.5M"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        let written = [(0, "0 B"), (512, "512 B"), (65536, "64 KiB"), (1536, "1.5 KiB"), (1 << 30, "1 GiB")];
        for (bytes, text) in written {
            assert_eq!(binary_size(bytes), text);
        }
    }
}
