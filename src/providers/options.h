/*-------------------------------------------------------------------------
 *
 * options.h
 *		What checks of options share with the readers of options.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_OPTIONS_H
#define AGENTVM_PROVIDERS_OPTIONS_H

#include "postgres.h"

#include "utils/jsonb.h"

#define MAX_DURATION_MS (366 * INT64CONST(86400000))
#define MAX_DURATION_TEXT 128 /* bytes of a duration's text */

#define DURATION_HINT                                                                              \
	"A duration is a number of seconds or text such as '500ms', '2s' or '1 hour', at most 366 "    \
	"days."

/* Whether the value is a whole number of 64 bits; never raises. */
extern bool integer_from_json(const JsonbValue *value, int64 *result);

/* Whether the value is a duration from 0 to MAX_DURATION_MS; never raises for what it holds. */
extern bool duration_from_json(const JsonbValue *value, int64 *ms);

#endif /* AGENTVM_PROVIDERS_OPTIONS_H */
