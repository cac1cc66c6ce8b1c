/*-------------------------------------------------------------------------
 *
 * xml.h
 *		Reading the XML that EC2 and STS answer with, through libxml2.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_NET_XML_H
#define AGENTVM_NET_XML_H

#include "postgres.h"

#include "secret/secret.h"

typedef struct XmlDoc XmlDoc;

/*
 * Parse "len" bytes, which a NUL must follow.  Returns NULL when it is no
 * well-formed XML (HTML error pages happen), not UTF-8, or more markup than any
 * answer has.  No network, no DTD, no entity expansion, bounded depth.  The
 * document is freed with CurrentMemoryContext (reset callback) or xml_free();
 * the latter should be done, as a context may see many answers.
 */
extern XmlDoc *xml_parse(const char *text, size_t len);

/* Free a document early. */
extern void xml_free(XmlDoc *doc);

/*
 * Text of the first node that the XPath names, compared by local names so that
 * namespaces do not matter, e.g. "//instancesSet/item/instanceId"; NULL when
 * there is none.  Palloc'd; control characters are replaced by spaces, and of a
 * long text only the first 4 kB are there.
 */
extern char *xml_text(XmlDoc *doc, const char *path);

/* The same, with the first 32 kB of a long text. */
extern char *xml_long_text(XmlDoc *doc, const char *path);

/*
 * The same as a secret in CurrentMemoryContext: one word without white space, as keys
 * are; NULL when there is none, or it is empty, in pieces, or longer than 32 kB.
 */
extern Secret *xml_secret(XmlDoc *doc, const char *path);

/* Number of nodes that the path names. */
extern int xml_count(XmlDoc *doc, const char *path);

#endif /* AGENTVM_NET_XML_H */
