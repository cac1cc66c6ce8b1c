/*-------------------------------------------------------------------------
 *
 * options.c
 *		Reading options and handles, which are jsonb objects.
 *
 * The registry has checked names and types before a provider reads anything,
 * so what does not fit here falls back to the default; only a duration that is
 * none raises, and does so naming the option.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <errno.h>
#include <math.h>

#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

#include "agentvm.h"
#include "db.h"
#include "providers/options.h"
#include "providers/provider.h"

JsonbValue *
option_value(Jsonb *object, const char *name)
{
	JsonbValue key;

	if (object == NULL || !JB_ROOT_IS_OBJECT(object))
		return NULL;

	key.type = jbvString;
	key.val.string.val = unconstify(char *, name);
	key.val.string.len = strlen(name);
	return findJsonbValueFromContainer(&object->root, JB_FOBJECT, &key);
}

char *
option_text(Jsonb *options, const char *name)
{
	JsonbValue *value = option_value(options, name);

	if (value == NULL)
		return NULL;
	switch (value->type)
	{
		case jbvString:
			return pnstrdup(value->val.string.val, value->val.string.len);
		case jbvNumeric:
			return DatumGetCString(
				DirectFunctionCall1(numeric_out, NumericGetDatum(value->val.numeric)));
		case jbvBool:
			return pstrdup(value->val.boolean ? "true" : "false");
		default:
			return NULL;
	}
}

bool
option_bool(Jsonb *options, const char *name, bool fallback)
{
	JsonbValue *value = option_value(options, name);

	return value != NULL && value->type == jbvBool ? value->val.boolean : fallback;
}

/* Not through numeric_int8, which raises and rounds. */
bool
integer_from_json(const JsonbValue *value, int64 *result)
{
	char *digits;
	char *end;
	bool whole;

	if (value->type != jbvNumeric)
		return false;

	/* without trailing zeros, so that 2.0 is 2 */
	digits = numeric_normalize(value->val.numeric);
	errno = 0;
	*result = strtoll(digits, &end, 10);
	whole = errno == 0 && end != digits && *end == '\0';
	pfree(digits);
	return whole;
}

int
option_int(Jsonb *options, const char *name, int fallback)
{
	int64 value = handle_int(options, name, fallback);

	return value >= PG_INT32_MIN && value <= PG_INT32_MAX ? (int) value : fallback;
}

int64
handle_int(Jsonb *object, const char *name, int64 fallback)
{
	JsonbValue *value = option_value(object, name);
	int64 result;

	return value != NULL && integer_from_json(value, &result) ? result : fallback;
}

/* Milliseconds of an interval, with months of 30 days and days of 24 hours. */
static int64
interval_ms(const Interval *interval)
{
	return ((int64) interval->month * 30 + interval->day) * INT64CONST(86400000) +
		   interval->time / 1000;
}

/*
 * Read interval text.  The input function raises for bad text and there is no
 * other way in before 16; catching that without a subtransaction is safe since
 * it only computes.  It also reads signs by IntervalStyle, so that is fixed
 * meanwhile: what a provider is told must not depend on who asks.
 */
static bool
interval_from_text(const char *text, int64 *ms)
{
	MemoryContext context = CurrentMemoryContext;
	int saved_style = IntervalStyle;
	volatile bool good = true;

	PG_TRY();
	{
		Interval *interval;

		IntervalStyle = INTSTYLE_POSTGRES;
		interval = DatumGetIntervalP(DirectFunctionCall3(
			interval_in, CStringGetDatum(text), ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
		*ms = interval_ms(interval);
	}
	PG_CATCH();
	{
		ErrorData *error;

		IntervalStyle = saved_style;
		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		if (ERRCODE_TO_CATEGORY(error->sqlerrcode) != ERRCODE_DATA_EXCEPTION)
			PG_RE_THROW();
		FlushErrorState();
		FreeErrorData(error);
		good = false;
	}
	PG_END_TRY();

	IntervalStyle = saved_style;
	return good;
}

bool
duration_from_json(const JsonbValue *value, int64 *ms)
{
	if (value->type == jbvNumeric)
	{
		double seconds;

		seconds = DatumGetFloat8(
			DirectFunctionCall1(numeric_float8_no_overflow, NumericGetDatum(value->val.numeric)));
		if (isnan(seconds) || seconds < 0 || seconds * 1000 > MAX_DURATION_MS)
			return false;
		*ms = (int64) rint(seconds * 1000);
		return true;
	}
	if (value->type == jbvString)
	{
		char *text;
		bool good;

		/* No duration is that long, and not every text should be parsed. */
		if (value->val.string.len > MAX_DURATION_TEXT)
			return false;
		text = pnstrdup(value->val.string.val, value->val.string.len);
		good = interval_from_text(text, ms);
		pfree(text);
		return good && *ms >= 0 && *ms <= MAX_DURATION_MS;
	}
	return false;
}

int64
option_ms(Jsonb *options, const char *name, int64 fallback)
{
	JsonbValue *value = option_value(options, name);
	int64 ms;

	if (value == NULL || value->type == jbvNull)
		return fallback;
	if (!duration_from_json(value, &ms))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"%s\" is not a duration", name), errhint("%s", DURATION_HINT),
				hide_caller());
	return ms;
}

List *
option_list(Jsonb *options, const char *name)
{
	JsonbValue *value = option_value(options, name);
	List *result = NIL;
	int i;
	int n;

	if (value == NULL)
		return NIL;
	if (value->type == jbvString)
		return list_make1(pnstrdup(value->val.string.val, value->val.string.len));
	if (value->type != jbvBinary || !JsonContainerIsArray(value->val.binary.data))
		return NIL;

	n = JsonContainerSize(value->val.binary.data);
	for (i = 0; i < n; i++)
	{
		JsonbValue *member = getIthJsonbValueFromContainer(value->val.binary.data, i);

		if (member->type == jbvString)
			result = lappend(result, pnstrdup(member->val.string.val, member->val.string.len));
	}
	return result;
}

static void
set_string(JsonbValue *value, const char *text)
{
	value->type = jbvString;
	value->val.string.val = unconstify(char *, text);
	value->val.string.len = strlen(text);
}

/* A copy of "object" with one member replaced, or removed when "value" is NULL. */
static Jsonb *
set_member(Jsonb *object, const char *name, JsonbValue *value)
{
	JsonbParseState *state = NULL;
	JsonbValue key;
	JsonbValue *result;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	if (object != NULL && JB_ROOT_IS_OBJECT(object))
	{
		JsonbIterator *iterator = JsonbIteratorInit(&object->root);
		JsonbIteratorToken token;
		JsonbValue item;
		bool keep = false;

		while ((token = JsonbIteratorNext(&iterator, &item, true)) != WJB_DONE)
		{
			if (token == WJB_KEY)
				keep = item.val.string.len != strlen(name) ||
					   memcmp(item.val.string.val, name, item.val.string.len) != 0;
			if ((token == WJB_KEY || token == WJB_VALUE) && keep)
				pushJsonbValue(&state, token, &item);
		}
	}
	if (value != NULL)
	{
		set_string(&key, name);
		pushJsonbValue(&state, WJB_KEY, &key);
		pushJsonbValue(&state, WJB_VALUE, value);
	}
	result = pushJsonbValue(&state, WJB_END_OBJECT, NULL);

	return JsonbValueToJsonb(result);
}

Jsonb *
handle_set_text(Jsonb *object, const char *name, const char *value)
{
	JsonbValue member;

	if (value == NULL)
		return set_member(object, name, NULL);

	set_string(&member, value);
	return set_member(object, name, &member);
}

Jsonb *
handle_set_bool(Jsonb *object, const char *name, bool value)
{
	JsonbValue member;

	member.type = jbvBool;
	member.val.boolean = value;
	return set_member(object, name, &member);
}

Jsonb *
handle_set_document(Jsonb *object, const char *name, Jsonb *value)
{
	JsonbValue member;

	member.type = jbvBinary;
	member.val.binary.data = &value->root;
	member.val.binary.len = VARSIZE(value) - VARHDRSZ;
	return set_member(object, name, &member);
}

Jsonb *
handle_set_int(Jsonb *object, const char *name, int64 value)
{
	JsonbValue member;

	member.type = jbvNumeric;
	member.val.numeric = int64_to_numeric(value);
	return set_member(object, name, &member);
}

Jsonb *
handle_make(const HandleMember *members, int count)
{
	JsonbParseState *state = NULL;
	JsonbValue *result;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	for (int i = 0; i < count; i++)
	{
		JsonbValue key;
		JsonbValue value;

		set_string(&key, members[i].name);
		if (members[i].text != NULL)
			set_string(&value, members[i].text);
		else
		{
			value.type = jbvNumeric;
			value.val.numeric = int64_to_numeric(members[i].number);
		}
		pushJsonbValue(&state, WJB_KEY, &key);
		pushJsonbValue(&state, WJB_VALUE, &value);
	}
	result = pushJsonbValue(&state, WJB_END_OBJECT, NULL);
	return JsonbValueToJsonb(result);
}
