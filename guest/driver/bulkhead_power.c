// SPDX-License-Identifier: GPL-2.0
/*
 * How a Bulkhead guest ends.
 *
 * The VMM listens on two I/O ports:
 *
 *   0x600  a byte: 1 = the guest has powered off, 2 = it has panicked
 *   0x601  before the 2: the panic message, by one string instruction
 *
 * The VMM ends the virtual machine at the write to 0x600, so it does not
 * return. Where nobody listens, the writes go nowhere: a power-off then falls
 * through to the handlers after this one, a panic to CONFIG_PANIC_TIMEOUT.
 *
 * Nothing is probed and no port is touched before the guest ends.
 */
#include <linux/err.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/limits.h>
#include <linux/notifier.h>
#include <linux/panic_notifier.h>
#include <linux/reboot.h>
#include <linux/string.h>
#include <asm/reboot.h>

#define END_PORT	0x600
#define MESSAGE_PORT	0x601

#define POWERED_OFF	1
#define PANICKED	2

/* The VMM keeps no more of a message than this. */
#define MESSAGE_MAX	512

static int power_off(struct sys_off_data *data)
{
	outb(POWERED_OFF, END_PORT);
	return NOTIFY_DONE;
}

static int panicked(struct notifier_block *block, unsigned long event, void *message)
{
	outsb(MESSAGE_PORT, message, strnlen(message, MESSAGE_MAX));
	outb(PANICKED, END_PORT);
	return NOTIFY_DONE;
}

/*
 * Last of the notifiers: those before it may still print or save something.
 */
static struct notifier_block panic_block = {
	.notifier_call = panicked,
	.priority = INT_MIN,
};

static int __init bulkhead_power_init(void)
{
	struct sys_off_handler *handler;

	atomic_notifier_chain_register(&panic_notifier_list, &panic_block);

	handler = register_sys_off_handler(SYS_OFF_MODE_POWER_OFF, SYS_OFF_PRIO_FIRMWARE,
					   power_off, NULL);
	/*
	 * A virtual machine that has halted for good is of no use to anyone:
	 * reboot(RB_HALT_SYSTEM) powers off.
	 */
	machine_ops.halt = machine_ops.power_off;
	return PTR_ERR_OR_ZERO(handler);
}
early_initcall(bulkhead_power_init);
