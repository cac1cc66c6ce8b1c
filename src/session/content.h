/*-------------------------------------------------------------------------
 *
 * content.h
 *		A bytea argument that is read piece by piece.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SESSION_CONTENT_H
#define AGENTVM_SESSION_CONTENT_H

#include "postgres.h"

typedef struct Content
{
	Datum value;	   /* as it was handed in */
	const char *bytes; /* all of them, or NULL: they are fetched when they are read */
	int64 len;
} Content;

/*
 * Open an argument of type bytea; "value" must stay.  Raises AV012, naming the
 * argument, when it is longer than agentvm.max_file_size; it is not fetched for that.
 */
extern void content_open(Content *content, Datum value, const char *argument);

/* "len" bytes from "offset" on, which must be there: palloc'd, or a part of the value. */
extern const char *content_read(const Content *content, int64 offset, int64 len);

#endif /* AGENTVM_SESSION_CONTENT_H */
