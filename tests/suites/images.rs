//! Images as people have them. containerd and a reference runtime say what is right:
//! the same image must give the same tree.

use std::{fs, thread, time::Duration};

use bulkhead_tests::{
    Command, Outcome,
    image::{Folder, Form, Image, Layer},
};
use serde_json::json;

/// Prints kind, mode, owner, links, time, content or target of all below `/t`; no time
/// of directories, which with containerd is that of unpacking where a layer adds to one
/// that it does not name.
const TREE: &str = "cd /; find t | sort | while read -r f; do
    # How an overlay counts the links of a directory depends on its layers.
    if [ -d \"$f\" ]; then more=; else more='%h %Y'; fi
    stat -c \"%n %F %a %u:%g $more\" \"$f\"
    if [ -L \"$f\" ]; then readlink \"$f\"; elif [ -f \"$f\" ]; then md5sum < \"$f\"; fi
done; stat -c '%n %a %u:%g' /";

/// Runs a shell line in the image at `place`.
fn sh(place: &str, line: &str) -> Outcome {
    Command::bulkhead(["run", "--rm", place, "--", "sh", "-c", line]).run()
}

/// The tree below `/t` as containerd unpacks the image.
fn reference(image: &Image, name: &str) -> String {
    let imported = image.import(&format!("localhost/test/{name}:latest"));
    let run = ["run", "--rm", imported.name(), name, "sh", "-c", TREE];
    Command::new("ctr", run).run().success()
}

/// Six layers in all forms, with what layers do to each other.
fn six_layers() -> Image {
    Image::busybox()
        .layer(
            Layer::new()
                .dir("t", 0o750)
                .dir("t/kept", 0o700)
                .file("t/kept/file", "one")
                .dir("t/hidden", 0o755)
                .file("t/hidden/below", "gone")
                .file("t/removed", "gone")
                .file("t/replaced", "file")
                .dir("t/dir-to-file", 0o755)
                .file("t/dir-to-file/inner", "gone"),
            Form::Gzip,
        )
        .layer(
            Layer::new()
                .whiteout("t/removed")
                .opaque("t/hidden")
                .file("t/hidden/above", "seen"),
            Form::Zstd,
        )
        .layer(
            Layer::new()
                .symlink("t/replaced", "kept/file")
                .file("t/dir-to-file", "file now")
                .file("t/first-name", "one file")
                .link("t/second-name", "t/first-name"),
            Form::Plain,
        )
        // A parent that only the layers below name, and one that nobody does.
        .layer(
            Layer::new()
                .file("t/kept/new", "two")
                .file("t/nobody/named/this", "three"),
            Form::Gzip,
        )
        .layer(
            Layer::new()
                .symlink("t/way", "kept")
                .file("t/way/through", "a link")
                .file("/t/absolute", "name"),
            Form::Zstd,
        )
}

#[test]
fn six_layers_in_every_compression_give_the_tree_that_containerd_gives() {
    let (image, folder) = (six_layers(), Folder::new());
    let layout = folder.place("layout");
    image.write_layout(layout.as_ref(), "localhost/test/six:latest");
    let ours = sh(&layout, TREE).success();
    assert_eq!(ours, reference(&image, "six"));
    for part in ["t/hidden/above", "t/nobody/named/this", "t/kept/through"] {
        assert!(ours.contains(part), "{part}: {ours}");
    }
    for gone in ["t/removed", "t/hidden/below", "t/dir-to-file/inner"] {
        assert!(!ours.contains(gone), "{gone}: {ours}");
    }
}

#[test]
fn archives_of_both_kinds_give_the_same_tree() {
    let (image, folder) = (six_layers(), Folder::new());
    let (oci, docker) = (folder.place("oci.tar"), folder.place("docker.tar"));
    image.write_archive(oci.as_ref(), "localhost/test/six:latest");
    image.write_docker_save(docker.as_ref(), "localhost/test/six:latest");
    let packed = format!("{docker}.gz");
    let gzip = format!("gzip -1 < {docker} > {packed}");
    Command::new("sh", ["-c", &gzip]).run().success();
    let tree = sh(&oci, TREE).success();
    assert!(tree.contains("t/kept/through"), "{tree}");
    assert_eq!(sh(&docker, TREE).success(), tree);
    assert_eq!(sh(&packed, TREE).success(), tree);
}

#[test]
fn entrypoint_user_and_directory_of_the_image_hold() {
    let folder = Folder::new();
    let users = Layer::new()
        .dir("etc", 0o755)
        .file(
            "etc/passwd",
            "root:x:0:0::/:/bin/sh\nworker:x:1234:4321::/home/w:/bin/sh\n",
        )
        .file(
            "etc/group",
            "root:x:0:\nworker:x:4321:\nextra:x:99:worker\n",
        )
        .dir("srv", 0o777);
    let image = Image::busybox()
        .layer(users, Form::Gzip)
        // The names are in a layer that is not the last.
        .layer(Layer::new().file("srv/data", "there"), Form::Gzip)
        .set("User", json!("worker"))
        .set("WorkingDir", json!("/srv"))
        .set(
            "Entrypoint",
            json!(["sh", "-c", "id; pwd; cat data; echo; echo $0 $HOME"]),
        )
        .set("Cmd", json!(["standard"]));
    let layout = folder.place("layout");
    image.write_layout(layout.as_ref(), "localhost/test/user:latest");
    let expected = |word| {
        format!(
            "uid=1234(worker) gid=4321(worker) groups=4321(worker),99(extra)\n/srv\nthere\n\
             {word} /home/w\n"
        )
    };
    let own = Command::bulkhead(["run", "--rm", &layout]).run().success();
    assert_eq!(
        own.replace(
            "groups=99(extra),4321(worker)",
            "groups=4321(worker),99(extra)"
        ),
        expected("standard")
    );
    let other = Command::bulkhead(["run", "--rm", &layout, "--", "other"])
        .run()
        .success();
    assert!(other.ends_with("other /home/w\n"), "{other}");
}

#[test]
fn a_hundred_and_twenty_eight_layers_are_one_tree() {
    let folder = Folder::new();
    let mut image = Image::busybox();
    for number in 1..=127 {
        let layer = Layer::new()
            .dir("t", 0o755)
            .file(&format!("t/{number}"), number.to_string())
            .file("t/last", number.to_string());
        image = image.layer(layer, Form::Plain);
    }
    let layout = folder.place("layout");
    image.write_layout(layout.as_ref(), "localhost/test/many:latest");
    let out = sh(&layout, "ls t | wc -l; cat t/1 t/64 t/127 t/last").success();
    assert_eq!(out, "128\n164127127");
}

#[test]
fn two_that_unpack_the_same_image_at_once_both_run() {
    let folder = Folder::new();
    let big = Layer::new().file("t", vec![b'x'; 8 << 20]);
    let image = Image::busybox().layer(big, Form::Gzip);
    let layout = folder.place("layout");
    image.write_layout(layout.as_ref(), "localhost/test/twice:latest");
    let run = || Command::bulkhead(["run", "--rm", &layout, "--", "wc", "-c", "/t"]).start();
    let (one, two) = (run(), run());
    for outcome in [one.wait(), two.wait()] {
        assert_eq!(outcome.success(), "8388608 /t\n");
    }
}

#[test]
fn a_kill_in_the_middle_of_unpacking_leaves_what_the_next_run_clears() {
    let folder = Folder::new();
    let big = Layer::new().file("t", vec![b'y'; 24 << 20]);
    let image = Image::busybox().layer(big, Form::Zstd);
    let layout = folder.place("layout");
    image.write_layout(layout.as_ref(), "localhost/test/killed:latest");
    let unfinished = || {
        let entries = fs::read_dir("/var/lib/bulkhead/layers").unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".unpacking-")).count()
    };
    let run = Command::bulkhead(["run", "--rm", &layout, "--", "true"]).start();
    // Many rounds of a tight wait: the directory is there while it unpacks.
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while unfinished() == 0 {
        assert!(std::time::Instant::now() < end, "nothing is unpacked");
        thread::yield_now();
    }
    run.signal(libc::SIGKILL);
    assert_eq!(run.wait().code, 137);
    assert_eq!(unfinished(), 1);
    assert_eq!(sh(&layout, "wc -c < /t").success(), "25165824\n");
    assert_eq!(unfinished(), 0);
}

#[test]
fn a_full_store_is_told_and_holds_nothing_half_done() {
    let folder = Folder::new();
    let image = Image::busybox().layer(Layer::new().file("t", vec![b'z'; 8 << 20]), Form::Gzip);
    let layout = folder.place("layout");
    image.write_layout(layout.as_ref(), "localhost/test/full:latest");
    let store = "/var/lib/bulkhead/layers";
    let small = ["-t", "tmpfs", "-o", "size=6M,mode=0700", "small", store];
    Command::new("mount", small).run().success();
    let outcome = sh(&layout, "true");
    let left = fs::read_dir(store).unwrap().flatten();
    let left: Vec<_> = left
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name.starts_with(".unpacking-"))
        .collect();
    Command::new("umount", [store]).run().success();
    let said = outcome.failure();
    assert!(
        said.contains("No space left") && said.contains(store),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(left.is_empty(), "{left:?}");
}
