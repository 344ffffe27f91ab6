//! Generates the types of containerd's transfer service, with its ttrpc client and
//! server.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=transfer.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .input("transfer.proto")
        .include(".")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The service's module is not listed in the generated mod.rs.
    let list = out.join("mod.rs");
    let text = fs::read_to_string(&list)?;
    if !text.contains("transfer_ttrpc") {
        fs::write(&list, text + "\npub mod transfer_ttrpc;\n")?;
    }
    Ok(())
}
