/*-------------------------------------------------------------------------
 *
 * xml.c
 *		Reading the XML that EC2 and STS answer with, through libxml2.
 *
 * An answer is untrusted input.  It is parsed without network, without
 * entities and without a DTD: a document that declares one is refused, since
 * no AWS service sends any.  libxml2's own limits on depth and text length stay
 * in force (XML_PARSE_HUGE is not given), and the caller has bounded the size.
 *
 * That is not enough: libxml2 needs 50 bytes of memory for each byte of empty
 * elements, and half a minute for the hundred thousand attributes that fit into
 * a megabyte, since it compares each with all others.  So markup is counted
 * first, which is done on bytes and hence wants a document in UTF-8, as AWS's
 * are; what a document itself says of its encoding is ignored.
 *
 * libxml2 allocates with malloc.  A reset callback on the memory context that
 * was current at xml_parse() frees the tree, so an error between parsing and
 * freeing leaks nothing.
 *
 * Paths are a small subset of XPath, "/a/b" and "//a/b", compared by local
 * names.  Matching looks from a node up to its ancestors, which needs neither
 * recursion nor a compiled expression.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <libxml/parser.h>
#include <libxml/tree.h>
#include <libxml/xmlerror.h>

#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/memutils.h"

#include "net/xml.h"

#define MAX_PATH_STEPS 16
#define MAX_TAGS 20000		/* a few hundred are usual */
#define MAX_ATTRIBUTES 4000 /* one is usual, but "=" may be in texts, too */
#define MAX_TAGS_LISTED 700 /* of an instance with 50 tags */
#define MAX_ATTRIBUTES_LISTED 50
#define MAX_TEXT 4096		/* bytes of an element's text that are kept */
#define MAX_LONG_TEXT 32768 /* of one that is asked for as a long one */

struct XmlDoc
{
	xmlDocPtr tree; /* NULL once freed */
	MemoryContextCallback callback;
};

/* A path, taken apart. */
typedef struct XmlPath
{
	bool anywhere; /* began with "//" */
	int nsteps;
	struct
	{
		const char *name;
		size_t len;
	} steps[MAX_PATH_STEPS];
} XmlPath;

/* Errors of the parser are told by its result alone; nothing may reach stderr. */
#if LIBXML_VERSION >= 21200
static void
ignore_error(void *arg, const xmlError *error)
#else
static void
ignore_error(void *arg, xmlErrorPtr error)
#endif
{
}

static void
free_tree(void *arg)
{
	XmlDoc *doc = arg;

	if (doc->tree != NULL)
		xmlFreeDoc(doc->tree);
	doc->tree = NULL;
}

/* Whether libxml2 may have it: little markup, no DTD, nothing that looks like another encoding. */
static bool
is_tame(const char *text, size_t len, int max_tags, int max_attributes)
{
	int tags = 0;
	int attributes = 0;

	for (size_t i = 0; i < len; i++)
	{
		if (text[i] == '<')
			tags++;
		else if (text[i] == '=')
			attributes++;
		else if (text[i] == '\0')
			return false;
	}
	return text[strspn(text, " \t\r\n")] == '<' && tags <= max_tags &&
		   attributes <= max_attributes && strstr(text, "<!DOCTYPE") == NULL;
}

/*
 * An answer may hold keys, of which libxml2 keeps copies here and there: have what
 * it frees overwritten, unless somebody else has given it an allocator.
 */
static void
wipe_what_is_freed(void)
{
	static bool done = false;
	xmlFreeFunc free_function;
	xmlMallocFunc malloc_function;
	xmlReallocFunc realloc_function;
	xmlStrdupFunc strdup_function;

	if (done)
		return;
	done = true;
	if (xmlMemGet(&free_function, &malloc_function, &realloc_function, &strdup_function) == 0 &&
		free_function == free && malloc_function == malloc)
		(void) xmlMemSetup(secret_free, malloc, secret_realloc, strdup_function);
}

static XmlDoc *
parse(const char *text, size_t len, int max_tags, int max_attributes)
{
	XmlDoc *doc;
	xmlParserCtxtPtr parser;
	xmlDocPtr tree;

	if (len == 0 || len > INT_MAX || !is_tame(text, len, max_tags, max_attributes))
		return NULL;

	wipe_what_is_freed();
	/* Allocate first, so that nothing can fail once libxml2 holds memory. */
	doc = palloc0(sizeof(XmlDoc));

	parser = xmlNewParserCtxt();
	if (parser == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	parser->sax->serror = ignore_error;
	tree = xmlCtxtReadMemory(parser, text, (int) len, NULL, "UTF-8",
							 XML_PARSE_NONET | XML_PARSE_NOERROR | XML_PARSE_NOWARNING |
								 XML_PARSE_NOCDATA | XML_PARSE_COMPACT | XML_PARSE_IGNORE_ENC);
	xmlFreeParserCtxt(parser);

	if (tree == NULL)
	{
		pfree(doc);
		return NULL;
	}

	doc->tree = tree;
	doc->callback.func = free_tree;
	doc->callback.arg = doc;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &doc->callback);
	return doc;
}

XmlDoc *
xml_parse(const char *text, size_t len)
{
	return parse(text, len, MAX_TAGS, MAX_ATTRIBUTES);
}

XmlDoc *
xml_parse_list(const char *text, size_t len, int things)
{
	return parse(text, len, MAX_TAGS + things * MAX_TAGS_LISTED,
				 MAX_ATTRIBUTES + things * MAX_ATTRIBUTES_LISTED);
}

/* The struct itself stays with its context: the callback there still points to it. */
void
xml_free(XmlDoc *doc)
{
	if (doc != NULL)
		free_tree(doc);
}

static void
parse_path(const char *text, XmlPath *path)
{
	const char *p = text;

	memset(path, 0, sizeof(XmlPath));
	if (p[0] == '/' && p[1] == '/')
	{
		path->anywhere = true;
		p++;
	}
	while (*p == '/')
	{
		size_t len = strcspn(++p, "/");

		if (len == 0 || path->nsteps == MAX_PATH_STEPS)
			elog(ERROR, "malformed path \"%s\"", text);
		path->steps[path->nsteps].name = p;
		path->steps[path->nsteps].len = len;
		path->nsteps++;
		p += len;
	}
	if (path->nsteps == 0 || *p != '\0')
		elog(ERROR, "malformed path \"%s\"", text);
}

/* Whether an element and its ancestors bear the names of the path, last to first. */
static bool
node_matches(xmlNodePtr node, const XmlPath *path)
{
	for (int i = path->nsteps - 1; i >= 0; i--)
	{
		if (node == NULL || node->type != XML_ELEMENT_NODE ||
			strlen((const char *) node->name) != path->steps[i].len ||
			memcmp(node->name, path->steps[i].name, path->steps[i].len) != 0)
			return false;
		node = node->parent;
	}
	return path->anywhere || node == NULL || node->type == XML_DOCUMENT_NODE;
}

/* The next node in document order, not leaving the tree; NULL at its end. */
static xmlNodePtr
next_node(xmlNodePtr node)
{
	if (node->type == XML_ELEMENT_NODE && node->children != NULL)
		return node->children;
	while (node != NULL && node->next == NULL)
		node = node->parent;
	return node == NULL || node->type == XML_DOCUMENT_NODE ? NULL : node->next;
}

/*
 * The first "max" bytes of the element's own text, in the server's encoding.
 * Where that is not UTF-8, other characters than ASCII become "?": a message must
 * never fail to be kept.
 */
static char *
node_text(xmlNodePtr node, int max)
{
	StringInfoData text;
	bool utf8 = GetDatabaseEncoding() == PG_UTF8;
	char *start;

	initStringInfo(&text);
	for (xmlNodePtr child = node->children; child != NULL && text.len <= max; child = child->next)
	{
		if ((child->type == XML_TEXT_NODE || child->type == XML_CDATA_SECTION_NODE) &&
			child->content != NULL)
			appendBinaryStringInfo(
				&text, (const char *) child->content,
				strnlen((const char *) child->content, max + MAX_MULTIBYTE_CHAR_LEN));
	}
	text.len = pg_encoding_mbcliplen(PG_UTF8, text.data, text.len, max);
	text.data[text.len] = '\0';

	for (int i = 0; i < text.len; i++)
	{
		unsigned char c = (unsigned char) text.data[i];

		if (c < 0x20 || c == 0x7f)
			text.data[i] = ' ';
		else if (c == 0xc2 && (unsigned char) text.data[i + 1] < 0xa0)
			text.data[i] = text.data[i + 1] = ' '; /* the controls U+0080 to U+009F */
		else if (c >= 0x80 && !utf8)
			text.data[i] = '?';
	}

	while (text.len > 0 && text.data[text.len - 1] == ' ')
		text.data[--text.len] = '\0';
	start = text.data;
	while (*start == ' ')
		start++;
	return memmove(text.data, start, strlen(start) + 1);
}

/* The first node that the path names, or NULL. */
static xmlNodePtr
find_node(XmlDoc *doc, const char *path)
{
	XmlPath parsed;
	xmlNodePtr node;

	parse_path(path, &parsed);
	if (doc == NULL || doc->tree == NULL)
		return NULL;
	for (node = xmlDocGetRootElement(doc->tree); node != NULL; node = next_node(node))
	{
		if (node_matches(node, &parsed))
			return node;
	}
	return NULL;
}

char *
xml_text(XmlDoc *doc, const char *path)
{
	xmlNodePtr node = find_node(doc, path);

	return node != NULL ? node_text(node, MAX_TEXT) : NULL;
}

char *
xml_long_text(XmlDoc *doc, const char *path)
{
	xmlNodePtr node = find_node(doc, path);

	return node != NULL ? node_text(node, MAX_LONG_TEXT) : NULL;
}

/* Keys are short lines of ASCII, which libxml2 has as one piece of text. */
Secret *
xml_secret(XmlDoc *doc, const char *path)
{
	xmlNodePtr node = find_node(doc, path);
	const char *text;
	size_t len;

	if (node == NULL || node->children == NULL || node->children->next != NULL ||
		node->children->type != XML_TEXT_NODE || node->children->content == NULL)
		return NULL;
	text = (const char *) node->children->content;
	text += strspn(text, " \t\r\n");
	len = strcspn(text, " \t\r\n");
	return len > 0 && len <= MAX_LONG_TEXT ? secret_make(text, len) : NULL;
}

int
xml_count(XmlDoc *doc, const char *path)
{
	XmlPath parsed;
	xmlNodePtr node;
	int count = 0;

	parse_path(path, &parsed);
	if (doc == NULL || doc->tree == NULL)
		return 0;
	for (node = xmlDocGetRootElement(doc->tree); node != NULL; node = next_node(node))
	{
		if (node_matches(node, &parsed))
			count++;
		if (!parsed.anywhere && parsed.nsteps == 1)
			break; /* that was the root */
	}
	return count;
}

/* ---- lists ---- */

/* The first element of a name from "node" on, among its siblings. */
static xmlNodePtr
named(xmlNodePtr node, const char *name, size_t len)
{
	while (node != NULL &&
		   (node->type != XML_ELEMENT_NODE || strncmp((const char *) node->name, name, len) != 0 ||
			node->name[len] != '\0'))
		node = node->next;
	return node;
}

XmlNode *
xml_root(XmlDoc *doc)
{
	return doc != NULL && doc->tree != NULL ? xmlDocGetRootElement(doc->tree) : NULL;
}

XmlNode *
xml_below(XmlNode *node, const char *path)
{
	while (node != NULL && *path != '\0')
	{
		size_t len = strcspn(path, "/");

		node = named(node->children, path, len);
		path += len;
		path += *path == '/';
	}
	return node;
}

XmlNode *
xml_next(XmlNode *after)
{
	const char *name = (const char *) after->name;

	return named(after->next, name, strlen(name));
}

char *
xml_source(XmlNode *node)
{
	xmlBufferPtr buffer = xmlBufferCreate();
	char *source = NULL;

	if (buffer != NULL && xmlNodeDump(buffer, node->doc, node, 0, 0) >= 0)
		source = MemoryContextAllocExtended(CurrentMemoryContext, xmlBufferLength(buffer) + 1,
											MCXT_ALLOC_NO_OOM);
	if (source != NULL)
		memcpy(source, xmlBufferContent(buffer), xmlBufferLength(buffer) + 1);
	if (buffer != NULL)
		xmlBufferFree(buffer);
	if (source == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	return source;
}

char *
xml_below_text(XmlNode *node, const char *path)
{
	node = xml_below(node, path);
	return node != NULL ? node_text(node, MAX_TEXT) : NULL;
}
