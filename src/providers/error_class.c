/*-------------------------------------------------------------------------
 *
 * error_class.c
 *		Names of the error classes, as they stand in events and views.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "providers/error_class.h"

static const char *const class_names[] = {
	[CLASS_NONE] = "none",			 [CLASS_CREDENTIALS] = "credentials",
	[CLASS_CAPACITY] = "capacity",	 [CLASS_THROTTLED] = "throttled",
	[CLASS_QUOTA] = "quota",		 [CLASS_NOT_FOUND] = "not_found",
	[CLASS_TRANSIENT] = "transient", [CLASS_PERMANENT] = "permanent",
};

StaticAssertDecl(lengthof(class_names) == NUM_ERROR_CLASSES, "an error class has no name");

const char *
error_class_name(ErrorClass class)
{
	if ((int) class < 0 || (int) class >= NUM_ERROR_CLASSES)
		elog(ERROR, "unknown error class %d", (int) class);
	return class_names[class];
}
