//! Precedence, aliases, values that cannot be used, and `docs/CONFIG.md` against the table.

use std::time::Duration;

use tidewire_core::TransportKind;

use super::{Config, PARAMS, Remark, markdown::config_markdown};

fn read(vars: &[(&str, &str)]) -> (Config, Vec<Remark>) {
    Config::from_vars(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
}

#[test]
fn nothing_set_is_the_default_without_remarks() {
    assert_eq!(read(&[("PATH", "/bin")]), (Config::default(), vec![]));
}

#[test]
fn own_variable_comes_before_alias() {
    let (config, remarks) = read(&[("TIDEWIRE_BATCH_TIMEOUT_MS", "1234"), ("MC_TRANSFER_TIMEOUT", "7")]);
    assert_eq!(config.batch_timeout, Duration::from_millis(1234));
    assert_eq!(remarks, []);
}

#[test]
fn alias_is_converted_and_said() {
    let (config, remarks) = read(&[("MC_TRANSFER_TIMEOUT", "7")]);
    assert_eq!(config.batch_timeout, Duration::from_secs(7));
    assert_eq!(remarks, [Remark::AliasUsed { alias: "MC_TRANSFER_TIMEOUT", name: "TIDEWIRE_BATCH_TIMEOUT_MS" }]);
}

#[test]
fn presence_alias_counts_whatever_its_value() {
    let (config, _) = read(&[("MC_FORCE_TCP", "0")]);
    assert_eq!(config.transports, [TransportKind::Local, TransportKind::Tcp, TransportKind::MooncakeTcp]);
}

#[test]
fn value_out_of_range_leaves_the_default_and_is_said() {
    for value in ["0", "65", "-1", "two", ""] {
        let (config, remarks) = read(&[("TIDEWIRE_MOONCAKE_LANES", value)]);
        assert_eq!(config, Config::default(), "{value}");
        assert!(matches!(remarks.as_slice(), [Remark::Ignored { name, .. }] if name == "TIDEWIRE_MOONCAKE_LANES"));
    }
}

#[test]
fn inverted_port_range_falls_back() {
    let (config, remarks) = read(&[("TIDEWIRE_PORT_MIN", "20000"), ("TIDEWIRE_PORT_MAX", "19000")]);
    assert_eq!((config.port_min, config.port_max), (15000, 17000));
    assert_eq!(remarks.len(), 1);
}

#[test]
fn unknown_variables_are_said_but_not_those_of_tests() {
    let (_, remarks) = read(&[("MC_NO_SUCH", "1"), ("TIDEWIRE_NO_SUCH", "1"), ("TIDEWIRE_TEST_X", "1")]);
    let names = remarks.iter().map(|r| match r {
        Remark::Unknown { name } => name.as_str(),
        _ => "",
    });
    assert_eq!(names.collect::<Vec<_>>(), ["MC_NO_SUCH", "TIDEWIRE_NO_SUCH"]);
}

#[test]
fn transports_are_a_list_of_known_names() {
    let (config, remarks) = read(&[("TIDEWIRE_TRANSPORTS", "tcp, shm,")]);
    assert_eq!((config.transports, remarks.len()), (vec![TransportKind::Tcp, TransportKind::Shm], 0));
    let (config, remarks) = read(&[("TIDEWIRE_TRANSPORTS", "tcp,rdma")]);
    assert_eq!((config.transports, remarks.len()), (vec![], 1));
}

#[test]
fn a_secret_is_not_in_a_remark() {
    let password = PARAMS.iter().find(|p| p.name == "TIDEWIRE_ETCD_PASSWORD").unwrap();
    assert!(password.secret);
}

#[test]
fn every_row_sets_what_it_gets() {
    for param in PARAMS {
        let mut config = Config::default();
        let value = param.value(&config);
        assert!(param.set(&mut config, &value), "{} refuses its own default", param.name);
        assert_eq!(config, Config::default(), "{}", param.name);
    }
    let mut names: Vec<_> = PARAMS.iter().map(|p| p.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), PARAMS.len());
}

#[test]
fn committed_document_is_what_the_table_prints() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/CONFIG.md");
    if std::env::var_os("TIDEWIRE_TEST_UPDATE_DOCS").is_some() {
        std::fs::write(path, config_markdown()).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap();
    assert_eq!(committed, config_markdown(), "run the test with TIDEWIRE_TEST_UPDATE_DOCS=1 and commit the file");
}
