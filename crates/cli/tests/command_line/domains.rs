//! What is said of domains before libvirt hears of them.

use crate::{images, run};

#[test]
fn what_libvirt_does_not_do_is_refused_and_not_ignored() {
    let dir = images();
    let xml = dir.path().join("domain.xml");
    std::fs::write(&xml, "<domain/>").unwrap();
    let managed = "save --domain web1 --managed --via libvirt";
    let waiting = "restore vm.img --qmp unix:/nonexistent";
    let not_libvirts = "libvirt's managed save knows no";
    let libvirts = "--xml and --reset-nvram are libvirt's, which does not restore this guest";
    for (line, expected) in [
        (format!("{managed} --overwrite"), format!("{not_libvirts} --overwrite")),
        (format!("{managed} --mode 640"), format!("{not_libvirts} --mode")),
        (format!("{managed} --pid 1"), format!("{not_libvirts} --pid")),
        (format!("{managed} --device-state command"), format!("{not_libvirts} --device-state")),
        (format!("{managed} --max-bandwidth 1M"), format!("{not_libvirts} --max-bandwidth")),
        (format!("{waiting} --xml {}", xml.display()), libvirts.to_owned()),
        (format!("{waiting} --reset-nvram"), libvirts.to_owned()),
        ("restore --domain vm.img --max-bandwidth 1M".to_owned(), "cannot be used with".to_owned()),
        ("restore --domain vm.img --resume".to_owned(), "cannot be used with".to_owned()),
        (format!("{waiting} --resume --foreground"), "cannot be used with".to_owned()),
        (format!("{waiting} --resume --qemu-log log"), "cannot be used with".to_owned()),
        (format!("{waiting} --resume --direct-io on"), "cannot be used with".to_owned()),
    ] {
        let said = run(&line);
        assert_eq!(said.code, Some(2), "{line}: {said:?}");
        assert!(said.stderr.contains(&expected), "{line}: {said:?}");
    }
}
