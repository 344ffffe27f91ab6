// SPDX-License-Identifier: GPL-2.0
/*
 * What the host changes in a shared directory, for those who watch it here.
 *
 * A virtio device with one queue. The guest offers buffers; the VMM writes one
 * struct notice into each when something happened to a directory or file that
 * this kernel holds, made by anybody but this guest. Each is told to inotify,
 * fanotify and dnotify as the VFS tells of a change of our own; before that,
 * what FUSE believes of the names and attributes is dropped, so that whoever
 * looks sees the change. Names and numbers come from the file server, which
 * knows what it gave out: the numbers of one share are never those of another
 * one on the device, so no more than the number is needed to find an inode.
 *
 * Nothing of this can be reached by a program: there is no device node.
 */
#include <linux/dcache.h>
#include <linux/fs.h>
#include <linux/fsnotify.h>
#include <linux/limits.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/workqueue.h>
#include "../../../fs/fuse/fuse_i.h"

/* For experiments and such as this (virtio 1.2, 5): never to be assigned. */
#define VIRTIO_ID_BULKHEAD_NOTIFY	65535

#define NOTICES	16

struct notice {
	/* A directory, or without a name any inode. */
	__le64 node;
	/* What the name stands for, or did: 0 if that is not known here. */
	__le64 child;
	/* FS_*; FS_DELETE_SELF and FS_MOVE_SELF are the child's. */
	__le32 mask;
	__le32 cookie;
	__le32 name_len;
	/* With room for an end: inotify copies it as a string. */
	char name[NAME_MAX + 1];
} __packed;

struct notices {
	struct virtqueue *queue;
	struct work_struct work;
	struct notice notice[NOTICES];
};

struct sought {
	u64 node;
	struct inode *inode;
};

static struct inode *held(struct fuse_conn *fc, u64 node)
{
	struct inode *inode;

	down_read(&fc->killsb);
	inode = fuse_ilookup(fc, node, NULL);
	up_read(&fc->killsb);
	return inode;
}

static void seek(struct super_block *sb, void *arg)
{
	struct sought *sought = arg;
	struct inode *inode;

	if (sought->inode)
		return;
	inode = held(get_fuse_conn_super(sb), sought->node);
	/* An inode must not outlive its file system. */
	if (inode && atomic_inc_not_zero(&sb->s_active))
		sought->inode = inode;
	else
		iput(inode);
}

/* In this order, if several are told at once. */
static const u32 events[] = {
	FS_CREATE, FS_ATTRIB, FS_MODIFY, FS_CLOSE_WRITE, FS_MOVED_FROM, FS_MOVED_TO, FS_DELETE,
};

static void tell_self(struct inode *inode, u32 mask)
{
	/* By a name, if it has one: its directory may be watched. */
	struct dentry *alias = d_find_any_alias(inode);
	int i;

	for (i = 0; i < ARRAY_SIZE(events); i++) {
		u32 event = mask & events[i] & ~ALL_FSNOTIFY_DIRENT_EVENTS;

		if (event && alias)
			fsnotify_dentry(alias, event);
		else if (event)
			fsnotify_inode(inode, event);
	}
	dput(alias);
}

static void tell(struct inode *dir, struct inode *child, u32 mask, u32 cookie,
		 const struct qstr *name)
{
	u32 isdir = mask & FS_ISDIR;
	struct inode *about = child ?: dir;
	int i;

	for (i = 0; i < ARRAY_SIZE(events); i++) {
		u32 event = mask & events[i];

		if (!event)
			continue;
		if (child && !(event & ALL_FSNOTIFY_DIRENT_EVENTS))
			fsnotify(event | isdir | FS_EVENT_ON_CHILD, child, FSNOTIFY_EVENT_INODE,
				 dir, name, child, 0);
		else
			fsnotify_name(event | isdir, about, FSNOTIFY_EVENT_INODE, dir, name,
				      cookie);
	}
	if (child && (mask & FS_MOVE_SELF))
		fsnotify_inode(child, FS_MOVE_SELF);
}

/* The child has lost its last name, as with FUSE_NOTIFY_DELETE. */
static void bury(struct fuse_conn *fc, u64 node, struct inode *child, struct qstr *name)
{
	int err;

	fsnotify_inode(child, FS_ATTRIB);
	down_read(&fc->killsb);
	err = fuse_reverse_inval_entry(fc, node, get_node_id(child), name, 0);
	up_read(&fc->killsb);
	/* No dentry any more whose end would tell. */
	if (err == -ENOENT)
		fsnotify_inoderemove(child);
}

static void take(struct notice *notice)
{
	struct file_system_type *type = get_fs_type("virtiofs");
	u64 node = le64_to_cpu(notice->node), child_node = le64_to_cpu(notice->child);
	u32 mask = le32_to_cpu(notice->mask);
	struct qstr name = QSTR_INIT(notice->name, le32_to_cpu(notice->name_len));
	struct sought sought = { .node = node };
	struct inode *dir, *child = NULL;
	struct super_block *sb;
	struct fuse_conn *fc;

	if (!type)
		return;
	iterate_supers_type(type, seek, &sought);
	put_filesystem(type);
	dir = sought.inode;
	/* The guest has forgotten it meanwhile. */
	if (!dir)
		return;
	sb = dir->i_sb;
	fc = get_fuse_conn_super(sb);

	down_read(&fc->killsb);
	fuse_reverse_inval_inode(fc, node, -1, 0);
	if (child_node)
		fuse_reverse_inval_inode(fc, child_node, -1, 0);
	if (name.len && (mask & ALL_FSNOTIFY_DIRENT_EVENTS))
		fuse_reverse_inval_entry(fc, node, 0, &name, FUSE_EXPIRE_ONLY);
	up_read(&fc->killsb);

	if (!name.len) {
		tell_self(dir, mask);
	} else if (S_ISDIR(dir->i_mode)) {
		if (child_node)
			child = held(fc, child_node);
		tell(dir, child, mask, le32_to_cpu(notice->cookie), &name);
		if (child && (mask & FS_DELETE_SELF))
			bury(fc, node, child, &name);
		iput(child);
	}
	iput(dir);
	deactivate_super(sb);
}

static bool is_whole(struct notice *notice, unsigned int len)
{
	u32 name_len = le32_to_cpu(notice->name_len);

	if (len < offsetof(struct notice, name) || name_len > NAME_MAX ||
	    len != offsetof(struct notice, name) + name_len)
		return false;
	notice->name[name_len] = 0;
	return strlen(notice->name) == name_len && !strchr(notice->name, '/');
}

static void offer(struct notices *notices, struct notice *notice)
{
	struct scatterlist sg;

	sg_init_one(&sg, notice, sizeof(*notice));
	/* There is a place for each: this fails only if the device has broken. */
	if (virtqueue_add_inbuf(notices->queue, &sg, 1, notice, GFP_KERNEL))
		dev_err_once(&notices->queue->vdev->dev, "cannot offer a buffer\n");
}

static void work(struct work_struct *work)
{
	struct notices *notices = container_of(work, struct notices, work);
	struct notice *notice;
	unsigned int len;

	do {
		virtqueue_disable_cb(notices->queue);
		while ((notice = virtqueue_get_buf(notices->queue, &len))) {
			if (is_whole(notice, len))
				take(notice);
			offer(notices, notice);
			virtqueue_kick(notices->queue);
			cond_resched();
		}
	} while (!virtqueue_enable_cb(notices->queue));
}

static void told(struct virtqueue *queue)
{
	struct notices *notices = queue->vdev->priv;

	/* Unbound: it may wait for who waits for the file server. */
	queue_work(system_unbound_wq, &notices->work);
}

static int probe(struct virtio_device *device)
{
	struct notices *notices = kzalloc(sizeof(*notices), GFP_KERNEL);
	int i;

	if (!notices)
		return -ENOMEM;
	INIT_WORK(&notices->work, work);
	device->priv = notices;
	notices->queue = virtio_find_single_vq(device, told, "notices");
	if (IS_ERR(notices->queue)) {
		int err = PTR_ERR(notices->queue);

		kfree(notices);
		return err;
	}
	for (i = 0; i < min_t(int, NOTICES, virtqueue_get_vring_size(notices->queue)); i++)
		offer(notices, &notices->notice[i]);
	virtio_device_ready(device);
	virtqueue_kick(notices->queue);
	return 0;
}

static void leave(struct virtio_device *device)
{
	struct notices *notices = device->priv;

	virtio_reset_device(device);
	cancel_work_sync(&notices->work);
	device->config->del_vqs(device);
	kfree(notices);
}

static const struct virtio_device_id ids[] = {
	{ VIRTIO_ID_BULKHEAD_NOTIFY, VIRTIO_DEV_ANY_ID },
	{ 0 },
};

static struct virtio_driver bulkhead_notify = {
	.driver.name = "bulkhead_notify",
	.id_table = ids,
	.probe = probe,
	.remove = leave,
};
builtin_driver(bulkhead_notify, register_virtio_driver);
