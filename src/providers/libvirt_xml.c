/*-------------------------------------------------------------------------
 *
 * libvirt_xml.c
 *		The documents that libvirt is told with, written and read by libxml2.
 *
 * Of a VM there is what an agent's machine needs and no more: no network card
 * unless the profile names a network, no USB, no video.  Devices sit on the root
 * bus, where a guest finds them soonest.
 *
 * This side of the provider knows nothing of PostgreSQL (see libvirt_thread.h).
 *
 *-------------------------------------------------------------------------
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <libxml/parser.h>
#include <libxml/xmlwriter.h>
#include <libxml/xpath.h>

#include "providers/libvirt_thread.h"

#define DEFAULT_VCPUS 1
#define DEFAULT_MEMORY_MIB 512
#define PROBE_MEMORY_MIB 256

/* A document that is being written. */
typedef struct Writer
{
	xmlBufferPtr buffer;
	xmlTextWriterPtr writer;
	int slot; /* of the root bus, next to be given out */
} Writer;

#define X(text) ((const xmlChar *) (text))

static void
begin(Writer *w)
{
	w->buffer = xmlBufferCreate();
	w->writer = w->buffer != NULL ? xmlNewTextWriterMemory(w->buffer, 0) : NULL;
	if (w->writer == NULL)
		abort();
	w->slot = 2;
}

static char *
finish(Writer *w)
{
	char *text;

	xmlTextWriterEndDocument(w->writer);
	xmlFreeTextWriter(w->writer);
	text = lv_format("%s", (const char *) xmlBufferContent(w->buffer));
	xmlBufferFree(w->buffer);
	return text;
}

/* <name a="b" ...>, from pairs that a NULL ends; a NULL value leaves its attribute out */
static void
open_with(Writer *w, const char *name, va_list pairs)
{
	const char *attribute;

	xmlTextWriterStartElement(w->writer, X(name));
	while ((attribute = va_arg(pairs, const char *)) != NULL)
	{
		const char *value = va_arg(pairs, const char *);

		if (value != NULL)
			xmlTextWriterWriteAttribute(w->writer, X(attribute), X(value));
	}
}

static void
open_element(Writer *w, const char *name, ...)
{
	va_list pairs;

	va_start(pairs, name);
	open_with(w, name, pairs);
	va_end(pairs);
}

static void
close_element(Writer *w)
{
	xmlTextWriterEndElement(w->writer);
}

/* <name a="b"/> */
static void
empty(Writer *w, const char *name, ...)
{
	va_list pairs;

	va_start(pairs, name);
	open_with(w, name, pairs);
	va_end(pairs);
	close_element(w);
}

/* <name>text</name> */
static void
text_element(Writer *w, const char *name, const char *text)
{
	xmlTextWriterWriteElement(w->writer, X(name), X(text));
}

static void
number_element(Writer *w, const char *name, const char *unit, uint64_t number)
{
	open_element(w, name, "unit", unit, NULL);
	xmlTextWriterWriteFormatString(w->writer, "%llu", (unsigned long long) number);
	close_element(w);
}

char *
lv_pool_xml(const char *name, const char *directory)
{
	Writer w;

	begin(&w);
	open_element(&w, "pool", "type", "dir", NULL);
	text_element(&w, "name", name);
	open_element(&w, "target", NULL);
	text_element(&w, "path", directory);
	return finish(&w);
}

/* What is only for the hypervisor to read. */
static void
volume_target(Writer *w, const char *format)
{
	open_element(w, "target", NULL);
	empty(w, "format", "type", format, NULL);
	open_element(w, "permissions", NULL);
	text_element(w, "mode", "0600");
	close_element(w);
	close_element(w);
}

char *
lv_raw_volume_xml(const char *name, uint64_t bytes)
{
	Writer w;

	begin(&w);
	open_element(&w, "volume", NULL);
	text_element(&w, "name", name);
	number_element(&w, "capacity", "bytes", bytes);
	volume_target(&w, "raw");
	return finish(&w);
}

char *
lv_overlay_xml(const char *name, uint64_t bytes, const char *base, const char *base_format)
{
	Writer w;

	begin(&w);
	open_element(&w, "volume", NULL);
	text_element(&w, "name", name);
	number_element(&w, "allocation", "bytes", 0);
	number_element(&w, "capacity", "bytes", bytes);
	volume_target(&w, "qcow2");
	open_element(&w, "backingStore", NULL);
	text_element(&w, "path", base);
	empty(&w, "format", "type", base_format, NULL);
	return finish(&w);
}

/* A place on the root bus for the device that is being written. */
static void
place(Writer *w)
{
	char slot[16];

	snprintf(slot, sizeof(slot), "0x%02x", w->slot++);
	empty(w, "address", "type", "pci", "domain", "0x0000", "bus", "0x00", "slot", slot, "function",
		  "0x0", NULL);
}

static void
disk(Writer *w, const char *target, const char *path, const char *format, const char *serial)
{
	open_element(w, "disk", "type", "file", "device", "disk", NULL);
	/* the disk lives no longer than its VM: what the host's cache has is good enough */
	empty(w, "driver", "name", "qemu", "type", format, "cache", serial ? NULL : "unsafe", "discard",
		  serial ? NULL : "unmap", NULL);
	empty(w, "source", "file", path, NULL);
	empty(w, "target", "dev", target, "bus", "virtio", NULL);
	if (serial != NULL)
	{
		text_element(w, "serial", serial);
		empty(w, "readonly", NULL);
	}
	place(w);
	close_element(w);
}

static void
boot_section(Writer *w, const LvJob *job, const LvMachine *machine, bool test)
{
	const char *kernel = lv_text(job, "kernel");
	const char *initrd = lv_text(job, "initrd");
	const char *more = lv_text(job, "cmdline");
	const char *type = lv_text(job, "machine");
	char *line;

	if (type == NULL || strcmp(type, "auto") == 0)
		type = "q35";
	open_element(w, "os", NULL);
	open_element(w, "type", "arch", test ? NULL : "x86_64", "machine", test ? NULL : type, NULL);
	xmlTextWriterWriteString(w->writer, X("hvm"));
	close_element(w);
	if (kernel != NULL && !test)
	{
		text_element(w, "kernel", kernel);
		if (initrd != NULL)
			text_element(w, "initrd", initrd);
		/*
		 * A guest that crashes ends; but a probe is only to end by switching itself
		 * off. On a busy host an emulated timer may be too late for the kernel's check
		 * of it, which is a panic.
		 */
		line =
			lv_format("console=ttyS0 quiet no_timer_check panic=%s%s%s%s",
					  machine->probe ? "0" : "-1", machine->disk != NULL ? " root=/dev/vda rw" : "",
					  machine->probe ? " agentvm.probe" : "", "");
		if (more != NULL && more[0] != '\0')
		{
			char *longer = lv_format("%s %s", line, more);

			free(line);
			line = longer;
		}
		text_element(w, "cmdline", line);
		free(line);
	}
	else
		empty(w, "boot", "dev", "hd", NULL);
	close_element(w);
}

static void
devices(Writer *w, const LvJob *job, const LvMachine *machine)
{
	const char *network = lv_text(job, "network");

	open_element(w, "devices", NULL);
	empty(w, "controller", "type", "usb", "model", "none", NULL);
	empty(w, "memballoon", "model", "none", NULL);
	/* nobody need read it, it fills no disk, and "virsh console" is there when somebody wants to */
	open_element(w, "serial", "type", "pty", NULL);
	empty(w, "target", "type", "isa-serial", NULL);
	close_element(w);
	if (machine->disk != NULL)
		disk(w, "vda", machine->disk, "qcow2", NULL);
	if (machine->boot_volume != NULL)
		disk(w, machine->disk != NULL ? "vdb" : "vda", machine->boot_volume, "raw", LV_BOOT_SERIAL);
	if (machine->socket != NULL)
	{
		open_element(w, "controller", "type", "virtio-serial", "index", "0", NULL);
		place(w);
		close_element(w);
		open_element(w, "channel", "type", "unix", NULL);
		empty(w, "source", "mode", "bind", "path", machine->socket, NULL);
		empty(w, "target", "type", "virtio", "name", LV_GATEWAY_PORT, NULL);
		close_element(w);
	}
	if (network != NULL && !machine->probe)
	{
		open_element(w, "interface", "type", "network", NULL);
		empty(w, "source", "network", network, NULL);
		empty(w, "model", "type", "virtio", NULL);
		place(w);
		close_element(w);
	}
	close_element(w);
}

char *
lv_domain_xml(const LvJob *job, const char *name, const LvMachine *machine)
{
	const char *driver = virConnectGetType(job->conn);
	bool test = driver != NULL && strcmp(driver, "TEST") == 0; /* libvirt's own mock */
	const char *session = lv_text(job, "session");
	int vcpus = machine->probe ? 0 : lv_int(job, "vcpus");
	int memory = machine->probe ? PROBE_MEMORY_MIB : lv_int(job, "memory_mib");
	Writer w;

	begin(&w);
	open_element(&w, "domain", "type", test ? "test" : (machine->kvm ? "kvm" : "qemu"), NULL);
	text_element(&w, "name", name);
	if (session != NULL && !machine->probe)
		text_element(&w, "uuid", session);
	open_element(&w, "metadata", NULL);
	xmlTextWriterStartElementNS(w.writer, X("agentvm"), X("vm"), X(LV_NAMESPACE));
	text_element(&w, "agentvm:cluster", lv_text(job, "cluster") ? lv_text(job, "cluster") : "");
	text_element(&w, "agentvm:session", machine->probe || session == NULL ? "" : session);
	text_element(&w, "agentvm:team", lv_text(job, "team") ? lv_text(job, "team") : "");
	close_element(&w);
	close_element(&w);
	number_element(&w, "memory", "MiB", memory > 0 ? memory : DEFAULT_MEMORY_MIB);
	open_element(&w, "vcpu", NULL);
	xmlTextWriterWriteFormatString(w.writer, "%d", vcpus > 0 ? vcpus : DEFAULT_VCPUS);
	close_element(&w);
	boot_section(&w, job, machine, test);
	if (!test)
	{
		open_element(&w, "features", NULL);
		empty(&w, "acpi", NULL);
		empty(&w, "apic", NULL);
		empty(&w, "vmport", "state", "off", NULL);
		close_element(&w);
		open_element(&w, "cpu", "mode", machine->kvm ? "host-passthrough" : "maximum", NULL);
		/* Linux would copy and clear memory by "rep movsb", which TCG does byte by byte */
		if (!machine->kvm)
			empty(&w, "feature", "policy", "disable", "name", "erms", NULL);
		close_element(&w);
		open_element(&w, "clock", "offset", "utc", NULL);
		empty(&w, "timer", "name", "hpet", "present", "no", NULL);
		close_element(&w);
	}
	text_element(&w, "on_poweroff", "destroy");
	text_element(&w, "on_reboot", machine->probe ? "restart" : "destroy");
	text_element(&w, "on_crash", "destroy");
	if (!test)
		devices(&w, job, machine);
	return finish(&w);
}

char *
lv_xpath(const char *xml, const char *path)
{
	xmlDocPtr doc = xmlReadMemory(xml, (int) strlen(xml), NULL, NULL,
								  XML_PARSE_NONET | XML_PARSE_NOERROR | XML_PARSE_NOWARNING);
	xmlXPathContextPtr context = doc != NULL ? xmlXPathNewContext(doc) : NULL;
	xmlXPathObjectPtr found = NULL;
	char *text = NULL;

	if (context != NULL)
		found = xmlXPathEvalExpression(X(path), context);
	if (found != NULL && found->nodesetval != NULL && found->nodesetval->nodeNr > 0)
	{
		xmlChar *content = xmlNodeGetContent(found->nodesetval->nodeTab[0]);

		if (content != NULL)
			text = lv_format("%s", (const char *) content);
		xmlFree(content);
	}
	xmlXPathFreeObject(found);
	xmlXPathFreeContext(context);
	xmlFreeDoc(doc);
	return text;
}
