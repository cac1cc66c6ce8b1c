/*-------------------------------------------------------------------------
 *
 * json.h
 *		Reading the JSON that AWS's other services answer with, by PostgreSQL's parser.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_NET_JSON_H
#define AGENTVM_NET_JSON_H

#include "postgres.h"

#include "secret/secret.h"

/*
 * Text of a string member, named by its path of one or more names ("context/action"),
 * of the object that "len" bytes are, which a NUL must follow; NULL when there is no
 * such member, no object, no JSON, or more nesting than any answer has.  Never raises
 * over what the bytes are.  Palloc'd; control characters and, where the server's
 * encoding is not UTF-8, other characters than ASCII are replaced.
 */
extern char *json_text(const char *json, size_t len, const char *path);

/* The same as a secret in CurrentMemoryContext, as it is; the parser's own copies are wiped. */
extern Secret *json_secret(const char *json, size_t len, const char *path);

#endif /* AGENTVM_NET_JSON_H */
