/*-------------------------------------------------------------------------
 *
 * content.c
 *		A bytea argument that is read piece by piece.
 *
 * A value that is stored apart from its row and not compressed is fetched slice by
 * slice.  Of a compressed one each slice would be decompressed from its beginning.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "agentvm.h"
#include "fmgr.h"
#include "session/content.h"

static bool
is_sliceable(struct varlena *value)
{
	struct varatt_external pointer;

	if (!VARATT_IS_EXTERNAL_ONDISK(value))
		return false;
	VARATT_EXTERNAL_GET_POINTER(pointer, value);
	return !VARATT_EXTERNAL_IS_COMPRESSED(pointer);
}

void
content_open(Content *content, Datum value, const char *argument)
{
	struct varlena *raw = (struct varlena *) DatumGetPointer(value);
	int64 limit = avm_max_file_size_kib * INT64CONST(1024);

	content->value = value;
	content->bytes = NULL;
	content->len = toast_raw_datum_size(value) - VARHDRSZ;
	if (content->len > limit)
		ereport(ERROR,
				(errcode(AVM_OVER_LIMIT),
				 errmsg("argument \"%s\" has %lld bytes, but at most %lld can be sent to a VM",
						argument, (long long) content->len, (long long) limit),
				 errhint("The limit is agentvm.max_file_size.")));
	if (!is_sliceable(raw))
	{
		raw = pg_detoast_datum_packed(raw);
		content->bytes = VARDATA_ANY(raw);
	}
}

const char *
content_read(const Content *content, int64 offset, int64 len)
{
	if (content->bytes != NULL)
		return content->bytes + offset;
	return VARDATA_ANY(pg_detoast_datum_slice((struct varlena *) DatumGetPointer(content->value),
											  (int32) offset, (int32) len));
}
