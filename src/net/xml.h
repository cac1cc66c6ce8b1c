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
typedef struct _xmlNode XmlNode; /* an element; of its document */

/*
 * Parse "len" bytes, which a NUL must follow.  Returns NULL when it is no
 * well-formed XML (HTML error pages happen), not UTF-8, or more markup than any
 * answer has.  No network, no DTD, no entity expansion, bounded depth.  The
 * document is freed with CurrentMemoryContext (reset callback) or xml_free();
 * the latter should be done, as a context may see many answers.
 */
extern XmlDoc *xml_parse(const char *text, size_t len);

/*
 * The same with the bounds of an answer that lists so many things that each would be
 * an answer of its own.
 */
extern XmlDoc *xml_parse_list(const char *text, size_t len, int things);

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

/*
 * For lists: the first element at a path below another one ("reservationSet/item"), or the
 * next one with the name of "after" beside that; NULL when there is none.  Costs no
 * more than the elements that are passed by.  "doc" may be NULL.
 */
extern XmlNode *xml_root(XmlDoc *doc);
extern XmlNode *xml_below(XmlNode *node, const char *path);
extern XmlNode *xml_next(XmlNode *after);

/* Text of the element at a path below another one, as xml_text() has it; NULL when there is none. */
extern char *xml_below_text(XmlNode *node, const char *path);

#endif /* AGENTVM_NET_XML_H */
