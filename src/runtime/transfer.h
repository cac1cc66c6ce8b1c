/*-------------------------------------------------------------------------
 *
 * transfer.h
 *		Files in and out: the calls put and get.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_TRANSFER_H
#define RUNTIME_TRANSFER_H

#include <jansson.h>
#include <stddef.h>

/* Do a put; returns the answer's header, a new reference. */
extern json_t *transfer_put(const json_t *header, const char *bytes, size_t len);

/* Do a get; the same, and *bytes is malloc'ed, or NULL. */
extern json_t *transfer_get(const json_t *header, char **bytes, size_t *len);

#endif /* RUNTIME_TRANSFER_H */
