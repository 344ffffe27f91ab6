//! Layers in, the merged tree out: the same as containerd and Docker make of them.

use super::*;

#[test]
fn owners_modes_times_and_links_are_as_in_the_archive_b37() {
    if !is_root() {
        return;
    }
    check(
        &[&[
            dir("./"),
            file("bin/tool", "x").mode(0o4755).owner(7, 8),
            hard("bin/hard", "bin/tool"),
            soft("bin/soft", "../../../../etc/passwd").owner(1, 2),
            dir("tmp").mode(0o1777),
            item("dev/fifo", b'6').mode(0o620),
            Item {
                device: (1, 3),
                ..item("dev/null", b'3')
            }
            .mode(0o666),
        ]],
        r#"
        /bin d755 0:0 @now
        /bin/hard -4755 7:8 "x" x2
        /bin/soft l777 1:2 -> ../../../../etc/passwd
        /bin/tool -4755 7:8 "x" x2
        /dev d755 0:0 @now
        /dev/fifo p620 0:0 0,0
        /dev/null c666 0:0 1,3
        /tmp d1777 0:0
        "#,
    );
}

#[test]
fn an_entry_for_the_root_sets_its_owner_mode_and_time() {
    if !is_root() {
        return;
    }
    for name in ["/", "./", "."] {
        let first = tar_of(&[dir(name).mode(0o711).owner(3, 4).mtime(5), file("a", "")]);
        let second = tar_of(&[file("b", "")]);
        for layers in [vec![first.clone()], vec![first, second]] {
            let tree = tree_of(&layers).unwrap();
            assert_eq!(tree.lines().next().unwrap(), "/ d711 3:4 @5", "{name}");
        }
    }
}

#[test]
fn absolute_names_count_from_the_root_of_the_image() {
    if !is_root() {
        return;
    }
    check(
        &[&[
            dir("/opt"),
            file("/opt/a", "x"),
            hard("/opt/b", "/opt/a"),
            hard("opt/c", "/../opt/./a"),
            file("opt/sub/../d", "y"),
        ]],
        r#"
        /opt d755 0:0
        /opt/a -644 0:0 "x" x3
        /opt/b -644 0:0 "x" x3
        /opt/c -644 0:0 "x" x3
        /opt/d -644 0:0 "y"
        "#,
    );
}

#[test]
fn links_on_the_way_are_followed_within_the_image_of_this_layer_and_those_below() {
    if !is_root() {
        return;
    }
    let below = [dir("usr"), dir("usr/lib"), soft("lib", "usr/lib")];
    let links = [
        soft("abs", "/usr/lib"),
        soft("usr/up", "../../../../../usr/lib"),
        soft("chain", "abs"),
        soft("later", "usr/made/deep"),
    ];
    let through = [
        file("lib/a", "1"),
        file("abs/b", "2"),
        file("usr/up/c", "3"),
        file("chain/d", "4"),
        file("later/e", "5"),
        hard("usr/lib/f", "chain/a"),
    ];
    let expected = r#"
        /abs l777 0:0 -> /usr/lib
        /chain l777 0:0 -> abs
        /later l777 0:0 -> usr/made/deep
        /lib l777 0:0 -> usr/lib
        /usr d755 0:0
        /usr/lib d755 0:0
        /usr/lib/a -644 0:0 "1" x2
        /usr/lib/b -644 0:0 "2"
        /usr/lib/c -644 0:0 "3"
        /usr/lib/d -644 0:0 "4"
        /usr/lib/f -644 0:0 "1" x2
        /usr/made d755 0:0 @now
        /usr/made/deep d755 0:0 @now
        /usr/made/deep/e -644 0:0 "5"
        /usr/up l777 0:0 -> ../../../../../usr/lib
        "#;
    check(&[&[&below[..], &links, &through].concat()], expected);
    check(&[&[&below[..], &links].concat(), &through], expected);
    check(&[&below, &links, &through], expected);
}

#[test]
fn a_later_entry_replaces_an_earlier_one_whatever_they_are() {
    if !is_root() {
        return;
    }
    let first = [
        dir("d1"),
        file("d1/x", "old"),
        dir("d2"),
        file("d2/x", "old"),
        file("f1", "old"),
        file("f2", "old"),
        soft("l1", "d1"),
        soft("l2", "d1"),
        dir("same").mode(0o700),
        file("same/x", "kept"),
        item("p", b'6'),
    ];
    let second = [
        file("d1", "new"),
        soft("d2", "/f2"),
        dir("f1"),
        soft("f2", "nowhere"),
        dir("l1"),
        file("l2", "new"),
        dir("same").mode(0o711).owner(5, 6),
        file("p", "new"),
    ];
    let expected = r#"
        /d1 -644 0:0 "new"
        /d2 l777 0:0 -> /f2
        /f1 d755 0:0
        /f2 l777 0:0 -> nowhere
        /l1 d755 0:0
        /l2 -644 0:0 "new"
        /p -644 0:0 "new"
        /same d711 5:6
        /same/x -644 0:0 "kept"
        "#;
    check(&[&[&first[..], &second].concat()], expected);
    check(&[&first, &second], expected);
}

#[test]
fn a_directory_that_only_a_child_names_is_as_in_the_layer_below() {
    if !is_root() {
        return;
    }
    let below = [
        dir("tmp").mode(0o1777).mtime(77),
        dir("srv")
            .mode(0o2750)
            .owner(8, 9)
            .pax("SCHILY.xattr.user.note", "x"),
        dir("srv/in").mode(0o700).owner(1, 1),
    ];
    let above = [
        file("tmp/added", "y"),
        file("srv/in/added", "y"),
        file("new/added", "y"),
    ];
    let expected = r#"
        /new d755 0:0 @now
        /new/added -644 0:0 "y"
        /srv d2750 8:9 [user.note]
        /srv/in d700 1:1
        /srv/in/added -644 0:0 "y"
        /tmp d1777 0:0 @77
        /tmp/added -644 0:0 "y"
        "#;
    check(&[&below, &above], expected);
    check(
        &[
            &below,
            &[file("other", "")],
            &above,
            &[file(".wh.other", "")],
        ],
        expected,
    );
}

#[test]
fn a_directory_that_is_named_again_has_only_its_new_attributes() {
    if !is_root() {
        return;
    }
    check(
        &[
            &[dir("d")
                .pax("SCHILY.xattr.user.a", "1")
                .pax("SCHILY.xattr.user.b", "1")],
            &[dir("d").pax("SCHILY.xattr.user.b", "2")],
        ],
        "/d d755 0:0 [user.b]",
    );
}

#[test]
fn what_was_a_file_below_can_be_the_way_to_an_entry() {
    if !is_root() {
        return;
    }
    check(
        &[&[file("a", "x")], &[file("a/b/c", "y")]],
        r#"
        /a d755 0:0 @now
        /a/b d755 0:0 @now
        /a/b/c -644 0:0 "y"
        "#,
    );
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_of_their_own_layer() {
    if !is_root() {
        return;
    }
    let below = [
        dir("d"),
        file("d/old", ""),
        dir("d/sub"),
        file("d/sub/old", ""),
        file("f", "old"),
        file("g", "old"),
        soft("l", "d"),
        dir("deep"),
        dir("deep/in"),
        file("deep/in/old", ""),
    ];
    let hidden = [
        file(".wh.d", ""),
        file(".wh.f", ""),
        file(".wh.l", ""),
        file("deep/.wh.in", ""),
        file(".wh.none", ""),
        file("deep/.wh..wh.plnk", ""),
        file("deep/.wh..wh.aufs/x", ""),
    ];
    let own = [
        file("d/new", "mine"),
        file("f", "new"),
        file("deep/in/new", "mine"),
    ];
    let expected = r#"
        /d d755 0:0
        /d/new -644 0:0 "mine"
        /deep d755 0:0
        /deep/in d755 0:0
        /deep/in/new -644 0:0 "mine"
        /f -644 0:0 "new"
        /g -644 0:0 "old"
        "#;
    let seen = |layers: &[&[Item]]| {
        let tars: Vec<_> = layers.iter().map(|items| tar_of(items)).collect();
        tree_of(&tars).unwrap().replace(" @now", "")
    };
    for order in [[&hidden[..6], &own].concat(), [&own, &hidden[..6]].concat()] {
        let tree = seen(&[&below, &order]);
        assert!(
            tree.ends_with(expected.replace("        ", "").trim()),
            "{tree}"
        );
        // The same for what an empty layer lies between.
        assert_eq!(seen(&[&below, &[], &order]), tree);
    }
    check(&[&below[..2], &[file(".wh.d", "")]], "");
    // Names of another tool's own files mean nothing, not even as directories.
    let tree = seen(&[&below, &hidden[6..]]);
    assert!(tree.contains("/deep/in/old"), "{tree}");
}

#[test]
fn an_opaque_directory_shows_only_its_own_layer_at_any_depth_in_any_order() {
    if !is_root() {
        return;
    }
    let below = [
        dir("d").mode(0o700),
        file("d/old", ""),
        dir("d/both"),
        file("d/both/old", ""),
        dir("d/both/gone"),
        file("d/replaced", "old"),
        dir("d/gone"),
        file("d/gone/x", ""),
    ];
    let own = [
        dir("d").mode(0o750),
        dir("d/both"),
        file("d/both/new", "x"),
        file("d/replaced", "new"),
    ];
    let mark = [file("d/.wh..wh..opq", "")];
    let expected = r#"
        /d d750 0:0
        /d/both d755 0:0
        /d/both/new -644 0:0 "x"
        /d/replaced -644 0:0 "new"
        "#;
    check(&[&below, &[&own[..], &mark].concat()], expected);
    check(&[&below, &[&own[..1], &mark, &own[1..]].concat()], expected);
    check(&[&below, &[&own[..3], &mark, &own[3..]].concat()], expected);
    // What was removed stays so above, and can come back.
    check(&[&below, &[&own[..], &mark].concat(), &[]], expected);
    check(
        &[
            &below,
            &[dir("d"), mark[0].clone()],
            &[file("d/old", "back")],
        ],
        r#"
        /d d755 0:0
        /d/old -644 0:0 "back"
        "#,
    );
    // The root itself.
    check(
        &[
            &below,
            &[file("a", "x"), file(".wh..wh..opq", ""), file("b", "x")],
        ],
        r#"
        /a -644 0:0 "x"
        /b -644 0:0 "x"
        "#,
    );
}

#[test]
fn a_layer_counts_at_each_of_its_places() {
    if !is_root() {
        return;
    }
    let one = [dir("opt"), file("opt/a", "x")];
    let other = [dir("opt"), file("opt/.wh.a", "")];
    check(
        &[&one, &other, &one],
        "/opt d755 0:0\n/opt/a -644 0:0 \"x\"",
    );
    check(&[&one, &other, &one, &other], "/opt d755 0:0");
    check(&[&one, &one], "/opt d755 0:0\n/opt/a -644 0:0 \"x\"");
}

#[test]
fn hard_links_join_files_of_lower_layers_and_links() {
    if !is_root() {
        return;
    }
    check(
        &[
            &[
                file("a", "x").mode(0o4711).owner(3, 4),
                soft("s", "a").owner(5, 6),
            ],
            &[hard("b", "a"), hard("t", "s"), hard("s", "s")],
        ],
        r#"
        /a -4711 3:4 "x" x2
        /b -4711 3:4 "x" x2
        /s l777 5:6 -> a x2
        /t l777 5:6 -> a x2
        "#,
    );
}

#[test]
fn a_hundred_and_thirty_layers_are_one_tree() {
    if !is_root() {
        return;
    }
    let layers: Vec<_> = (0..130)
        .map(|number| {
            tar_of(&[
                dir("opt"),
                file(&format!("opt/{number}"), "x"),
                file("last", &number.to_string()),
            ])
        })
        .collect();
    let tree = tree_of(&layers).unwrap();
    assert_eq!(
        tree.lines()
            .filter(|line| line.starts_with("/opt/"))
            .count(),
        130
    );
    assert!(tree.contains("/last -644 0:0 \"129\""), "{tree}");
}

#[test]
fn times_are_those_of_containerd() {
    if !is_root() {
        return;
    }
    check(
        &[&[
            // Only the extended header tells it, to the nanosecond.
            file("fraction", "").pax("mtime", "1700000000.5"),
            file("long", "").pax("mtime", "1700000000.0123456789"),
            // Before 1970, and after what 63 bits of nanoseconds can say.
            file("negative", "").mtime(-5),
            file("negative-pax", "").pax("mtime", "-1.5"),
            file("far", "").mtime(1 << 40),
            soft("link", "x").pax("mtime", "7.25"),
            dir("dir").mtime(9),
            file("dir/x", ""),
        ]],
        r#"
        /dir d755 0:0 @9
        /dir/x -644 0:0 ""
        /far -644 0:0 "" @0
        /fraction -644 0:0 "" @1700000000.500000000
        /link l777 0:0 -> x @7.250000000
        /long -644 0:0 "" @1700000000.012345678
        /negative -644 0:0 "" @0
        /negative-pax -644 0:0 "" @0
        "#,
    );
}

#[test]
fn old_and_foreign_tars_are_read() {
    if !is_root() {
        return;
    }
    let v7 = |name: &str, letter, content: &str| Item {
        magic: [0; 8],
        letter,
        ..file(name, content)
    };
    let gnu = |name: &str, letter| Item {
        magic: *b"ustar  \0",
        ..item(name, letter)
    };
    let long = "n".repeat(150);
    check(
        &[&[
            // V7 knows directories by their names alone, and no letter for files.
            v7("old/", 0, "").mode(0o700),
            v7("old/file", 0, "x"),
            Item {
                content: format!("{long}\0").into_bytes(),
                ..gnu("././@LongLink", b'L')
            },
            gnu("short", b'0'),
            Item {
                content: b"file\0".to_vec(),
                ..gnu("././@LongLink", b'K')
            },
            gnu("link", b'2'),
            Item {
                content: b"ignored".to_vec(),
                ..item("global", b'g')
            },
            item("contiguous", b'7'),
            // A size that is no content.
            gnu("dir", b'5'),
        ]],
        &format!(
            r#"
        /contiguous -644 0:0 ""
        /dir d644 0:0
        /link l777 0:0 -> file
        /{long} -644 0:0 ""
        /old d700 0:0
        /old/file -644 0:0 "x"
        "#
        )
        .replace("/dir d644", "/dir d755"),
    );
}

#[test]
fn numbers_beyond_their_fields_are_kept() {
    if !is_root() {
        return;
    }
    check(
        &[&[
            file("a", "").owner(3_000_000, 4_000_000_000),
            file("b", "").pax("uid", "3000001").pax("gid", "9"),
        ]],
        r#"
        /a -644 3000000:4000000000 ""
        /b -644 3000001:9 ""
        "#,
    );
}

#[test]
fn devices_that_overlayfs_takes_for_whiteouts_are_whiteouts() {
    if !is_root() {
        return;
    }
    check(
        &[&[file("a", "x"), file("b", "y")], &[item("a", b'3')]],
        "/b -644 0:0 \"y\"",
    );
    check(&[&[item("a", b'3'), item("b", b'6')]], "/b p644 0:0 0,0");
}

#[test]
fn users_are_looked_up_in_the_merged_tree() {
    if !is_root() {
        return;
    }
    let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/sh\n";
    let image = Layout::of(&[
        tar_of(&[
            file("usr/etc/passwd", "old:x:1:1::/:\n"),
            file("usr/etc/group", "adm:x:4:web\n"),
        ]),
        tar_of(&[soft("etc", "/usr/etc")]),
        tar_of(&[file("etc/passwd", passwd)]),
    ]);
    let layers = image.open().unwrap().layers;
    let found = users::look_up(&layers, "web").unwrap();
    assert_eq!((found.user.uid, found.user.gid), (33, 34));
    assert_eq!(
        (found.user.groups, found.home.as_str()),
        (vec![4], "/srv/web")
    );
    assert!(users::look_up(&layers, "old").is_err());
    assert!(users::look_up(&layers[..2], "old").is_ok());
    // One directory is its own tree; none has no users.
    assert!(users::look_up(&layers[..1], "old").is_err());
    assert_eq!(users::look_up(&[], "7").unwrap().user.uid, 7);
}
